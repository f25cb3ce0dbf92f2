package nbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
)

// Errno is an error number of the protocol. A device may return (or wrap) one
// to choose what the client sees; the client returns them.
type Errno uint32

// The error numbers that the protocol knows.
const (
	EPERM     Errno = 1   // not permitted, e.g. a write to a read-only export
	EIO       Errno = 5   // input or output failed
	ENOMEM    Errno = 12  // no memory
	EINVAL    Errno = 22  // malformed or out of bounds
	ENOSPC    Errno = 28  // no space, or a write behind the end
	EOVERFLOW Errno = 75  // the answer would be too long
	ENOTSUP   Errno = 95  // not supported
	ESHUTDOWN Errno = 108 // the server is going away
)

// Error returns the meaning of e.
func (e Errno) Error() string {
	switch e {
	case EPERM:
		return "operation not permitted"
	case EIO:
		return "input/output error"
	case ENOMEM:
		return "out of memory"
	case EINVAL:
		return "invalid argument"
	case ENOSPC:
		return "no space left"
	case EOVERFLOW:
		return "value too large"
	case ENOTSUP:
		return "operation not supported"
	case ESHUTDOWN:
		return "server is shutting down"
	}
	return fmt.Sprintf("error number %d", uint32(e))
}

// Is makes errors.Is answer for the standard library's kinds as well.
func (e Errno) Is(target error) bool {
	switch e {
	case EPERM:
		return target == fs.ErrPermission
	case ENOTSUP:
		return target == errors.ErrUnsupported
	case ENOSPC:
		return target == syscall.ENOSPC
	}
	return false
}

// errnoOf chooses the number that tells a client about err.
func errnoOf(err error) Errno {
	var e Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e
	case errors.Is(err, errors.ErrUnsupported):
		return ENOTSUP
	case errors.Is(err, fs.ErrPermission):
		return EPERM
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return ENOSPC
	case errors.Is(err, syscall.ENOMEM):
		return ENOMEM
	case errors.Is(err, syscall.EINVAL):
		return EINVAL
	case errors.Is(err, context.Canceled), errors.Is(err, fs.ErrClosed):
		return ESHUTDOWN
	}
	return EIO
}
