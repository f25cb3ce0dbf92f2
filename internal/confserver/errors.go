package confserver

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	"farside/internal/api"
	"farside/internal/dr"
)

// errNoCredentials says that a caller did not prove who it is; wrap it beside dr.ErrDenied.
var errNoCredentials = errors.New("no valid credentials")

// errTimeout says that what was waited for did not happen in time.
var errTimeout = errors.New("not in time")

// wireKinds maps kinds of error to what the API tells; the first that fits wins.
func wireKinds() []struct {
	is   error
	code connect.Code
	kind string
} {
	return []struct {
		is   error
		code connect.Code
		kind string
	}{
		{errNoCredentials, connect.CodeUnauthenticated, api.KindDenied},
		{errTimeout, connect.CodeDeadlineExceeded, api.KindTimeout},
		{dr.ErrInvalid, connect.CodeInvalidArgument, api.KindInvalid},
		{dr.ErrNoPoint, connect.CodeNotFound, api.KindNoPoint},
		{dr.ErrNotFound, connect.CodeNotFound, api.KindNotFound},
		{dr.ErrExists, connect.CodeAlreadyExists, api.KindExists},
		{dr.ErrDenied, connect.CodePermissionDenied, api.KindDenied},
		{dr.ErrCorrupt, connect.CodeDataLoss, api.KindCorrupt},
		{dr.ErrGap, connect.CodeDataLoss, api.KindCorrupt},
		{dr.ErrVersion, connect.CodeFailedPrecondition, api.KindVersion},
		{dr.ErrTimeline, connect.CodeFailedPrecondition, api.KindTimeline},
		{dr.ErrFull, connect.CodeResourceExhausted, api.KindFull},
		{dr.ErrUnsupported, connect.CodeUnimplemented, api.KindUnsupported},
		{dr.ErrUnavailable, connect.CodeUnavailable, api.KindUnavailable},
		{context.DeadlineExceeded, connect.CodeDeadlineExceeded, api.KindTimeout},
		{context.Canceled, connect.CodeCanceled, api.KindTimeout},
	}
}

// wireError makes of an error what the API tells.
func wireError(err error) *connect.Error {
	var e *connect.Error
	if errors.As(err, &e) {
		return e
	}
	for _, k := range wireKinds() {
		if errors.Is(err, k.is) {
			return api.NewError(k.code, k.kind, err)
		}
	}
	return api.NewError(connect.CodeInternal, api.KindInternal, err)
}

// kindError returns the error of a kind that a node named in a report, or nil.
func kindError(kind string) error {
	for _, k := range wireKinds() {
		if k.kind == kind && kind != api.KindTimeout {
			return k.is
		}
	}
	return nil
}
