package capture

import (
	"context"
	"time"
)

// Verifier is an optional ability of a Source that may learn of changes late, or
// may have been cut off from its disks without an event: one that compares content
// from time to time, or one that gets the writes over a connection. Its consumer
// asks it before it relies on having everything.
//
// A Source that carries no data (Resume answers dr.ErrUnsupported) must have it:
// nothing else says when the copy is one state.
type Verifier interface {
	Source

	// Verify is called by a consumer that has taken everything over: all events,
	// and what ReadAt returned of all that was dirty. It returns a moment for which
	// the Source vouches: what the consumer has is a state of the disks in which a
	// power cut at that moment could have left them. The moment never goes back.
	//
	// An error that wraps dr.ErrUnavailable says that it can't tell yet, and why:
	// ask again later. One that wraps dr.ErrNoPoint says so too, after it tried and found
	// that the disks changed meanwhile: worth telling people. Any other error
	// says that it never will: open a new Source and compare.
	//
	// It may take as long as a question to a neighbouring process takes, never as long as
	// reading disks does.
	Verify(ctx context.Context) (time.Time, error)
}
