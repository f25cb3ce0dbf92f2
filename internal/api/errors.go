package api

import (
	"errors"

	"connectrpc.com/connect"

	farsidev1 "farside/internal/api/farside/v1"
)

// The kinds of error that the API tells: what ErrorReason.Kind may be.
const (
	KindInvalid     = "invalid"
	KindNotFound    = "not-found"
	KindExists      = "exists"
	KindDenied      = "denied"
	KindCorrupt     = "corrupt"
	KindVersion     = "version"
	KindTimeline    = "timeline"
	KindFull        = "full"
	KindUnsupported = "unsupported"
	KindUnavailable = "unavailable"
	KindNoPoint     = "no-point"
	KindTimeout     = "timeout"
	KindInternal    = "internal"
)

// NewError makes an error of a call.
func NewError(code connect.Code, kind string, err error) *connect.Error {
	e := connect.NewError(code, err)
	if detail, derr := connect.NewErrorDetail(&farsidev1.ErrorReason{Kind: kind}); derr == nil {
		e.AddDetail(detail)
	}
	return e
}

// ErrorKind returns the kind of an error that a call returned, or "" if it is
// none. An error that has no ErrorReason, such as of a proxy, gets its kind from its code.
func ErrorKind(err error) string {
	var e *connect.Error
	if !errors.As(err, &e) {
		return ""
	}
	for _, d := range e.Details() {
		m, derr := d.Value()
		if r, ok := m.(*farsidev1.ErrorReason); derr == nil && ok {
			return r.GetKind()
		}
	}
	return kindOfCode(e.Code())
}

// ErrorText returns the text of an error that a call returned, without its code.
func ErrorText(err error) string {
	var e *connect.Error
	if errors.As(err, &e) {
		return e.Message()
	}
	return err.Error()
}

func kindOfCode(c connect.Code) string {
	switch c {
	case connect.CodeInvalidArgument, connect.CodeOutOfRange:
		return KindInvalid
	case connect.CodeNotFound:
		return KindNotFound
	case connect.CodeAlreadyExists:
		return KindExists
	case connect.CodePermissionDenied, connect.CodeUnauthenticated:
		return KindDenied
	case connect.CodeDataLoss:
		return KindCorrupt
	case connect.CodeResourceExhausted:
		return KindFull
	case connect.CodeUnimplemented:
		return KindUnsupported
	case connect.CodeUnavailable, connect.CodeFailedPrecondition, connect.CodeAborted:
		return KindUnavailable
	case connect.CodeDeadlineExceeded, connect.CodeCanceled:
		return KindTimeout
	}
	return KindInternal
}
