package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// vouched returns the moment of the state that the far side has when all was drained.
// Most sources see every change themselves: it is the moment of the mark. A
// capture.Verifier is asked; ok is false if it can't tell yet.
func (r *replicator) vouched(ctx context.Context) (at time.Time, ok bool, err error) {
	v, asks := r.src.(capture.Verifier)
	if !asks {
		return r.sync.markedAt, true, nil
	}
	at, err = v.Verify(ctx)
	switch {
	case errors.Is(err, dr.ErrNoPoint):
		r.sync.unverified = err
		return at, false, nil
	case errors.Is(err, dr.ErrUnavailable):
		return at, false, nil
	case err != nil:
		return at, false, fmt.Errorf("verify capture: %w", err)
	}
	r.sync.unverified = nil
	if r.sync.dataless {
		return at, at.After(r.sync.offered), nil
	}
	return r.sync.markedAt, true, nil
}

// offer puts a recovery point into the stream of a source that carries no data.
// The stream stays in its sync: what changes next is found by the source's next
// pass, and no position before the end of that is a state that the disks were in.
func (r *replicator) offer(at time.Time) error {
	r.tags.mark(r.src, r.now)
	if err := r.putHeartbeat(at); err != nil {
		return err
	}
	r.sync.offered, r.sync.closing = at, false
	r.why = ReasonScan
	for _, d := range r.disks {
		d.Total, d.Done = 0, 0
	}
	if r.tags.count == 0 || r.tags.when.After(at) {
		return nil
	}
	_, err := r.putTags()
	return err
}
