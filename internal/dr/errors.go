package dr

import "errors"

// Kinds of error on which callers act. Wrap them: fmt.Errorf("verb object: %w", dr.ErrX).
var (
	// ErrInvalid: an input is malformed; trying again can't help.
	ErrInvalid = errors.New("invalid")
	// ErrNotFound: the named thing does not exist.
	ErrNotFound = errors.New("not found")
	// ErrExists: the thing is there already.
	ErrExists = errors.New("exists already")
	// ErrDenied: the caller may not do that.
	ErrDenied = errors.New("denied")
	// ErrCorrupt: stored or received bytes are not what was written.
	ErrCorrupt = errors.New("corrupt")
	// ErrVersion: bytes of a format version that this program doesn't know.
	ErrVersion = errors.New("unknown format version")
	// ErrGap: a frame does not continue its predecessor; something is missing.
	ErrGap = errors.New("gap in the stream")
	// ErrRepeat: a frame was there already; ignoring it is right.
	ErrRepeat = errors.New("frame repeated")
	// ErrTimeline: the sender stands on an old timeline and must stand down.
	ErrTimeline = errors.New("timeline is not current")
	// ErrFull: a bound of space or memory is reached; later may be better.
	ErrFull = errors.New("full")
	// ErrUnsupported: this platform or kernel can't do that.
	ErrUnsupported = errors.New("not supported here")
	// ErrUnavailable: a peer or device does not answer; later may be better.
	ErrUnavailable = errors.New("unavailable")
	// ErrNoPoint: no recovery point at the asked position or time.
	ErrNoPoint = errors.New("no recovery point there")
)
