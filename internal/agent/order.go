package agent

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"farside/internal/dr"
)

// order is a tag that somebody on this machine waits for. It is placed or not, and whoever
// waits knows which.
type order struct {
	tag dr.Tag
	// held, if not nil, reports whether the file systems stand still yet for this tag: it is
	// placed while they do and the stream is exact, or not at all. Without it the tag waits.
	held  func() error
	state atomic.Uint32
	mark  uint64        // stream position that the tag must not precede, once when is set
	when  time.Time     // when that was the tail: the time of the tag
	at    dr.Position   // when done is closed; zero if the tag was not placed
	why   error         // then: why not
	done  chan struct{} // closed when the replicator has dealt with it
}

const (
	orderOpen      uint32 = iota
	orderClaimed          // the replicator is placing it
	orderWithdrawn        // nobody waits any more: it must not be placed
)

// errNotExact says that the stream can't have a point now.
var errNotExact = fmt.Errorf("the stream is not exact: %w", dr.ErrUnavailable)

// claim reports whether the tag may still be placed; then it is.
func (o *order) claim() bool     { return o.state.CompareAndSwap(orderOpen, orderClaimed) }
func (o *order) withdrawn() bool { return o.state.Load() == orderWithdrawn }

// place puts a tag into the stream behind everything that was submitted before the
// call, and returns its position. It waits until ctx ends, for the stream to be exact too unless
// held is not nil, see order. After an error the tag is not in the stream and won't be.
func (s *stream) place(ctx context.Context, t dr.Tag, held func() error) (dr.Position, error) {
	o := &order{tag: t, held: held, done: make(chan struct{})}
	s.mu.Lock()
	s.mu.orders = append(s.mu.orders, o)
	s.mu.Unlock()
	select {
	case <-o.done:
	case <-ctx.Done():
		if o.state.CompareAndSwap(orderOpen, orderWithdrawn) {
			return dr.Position{}, ctx.Err()
		}
		<-o.done // at once: it is being placed
	}
	if o.why != nil {
		return dr.Position{}, fmt.Errorf("place tag %q: %w", t.Name, o.why)
	}
	return o.at, nil
}

// putOrders places what is ordered and can be placed now.
func (r *replicator) putOrders() (err error) {
	r.tags.orders = slices.DeleteFunc(r.tags.orders, func(o *order) (gone bool) {
		if err == nil {
			gone, err = r.tryOrder(o)
		}
		return gone
	})
	return err
}

// tryOrder reports whether o is dealt with. An error ends the stream.
func (r *replicator) tryOrder(o *order) (bool, error) {
	switch {
	case r.phase == Exact:
		if o.when.IsZero() {
			o.mark, o.when = r.src.Tail(), r.now
		}
		if caught, err := r.caughtUp(o.mark); err != nil || !caught {
			return o.withdrawn(), err // if the stream is not exact any more, the next step sees that
		}
	case o.held == nil:
		o.when = time.Time{} // it gets the time of a moment at which the stream is exact
		return o.withdrawn(), nil
	}
	if !o.claim() {
		return true, nil
	}
	var err error
	o.at, o.why, err = r.obey(o)
	close(o.done)
	return true, err
}

// obey places the tag of o, or returns why that can't be, and an error that ends the stream.
func (r *replicator) obey(o *order) (p dr.Position, why, err error) {
	if r.phase != Exact {
		return p, errNotExact, nil
	}
	if o.held != nil {
		// All that the frames hold was taken over before this question.
		if why := o.held(); why != nil {
			return p, why, nil
		}
	}
	placed, err := r.putTag(o.tag, o.when)
	switch {
	case err != nil:
		return p, err, err
	case !placed:
		return p, errNotExact, nil // the stream has begun anew just now
	}
	p = r.enc.Cursor().Position
	if o.held != nil {
		r.tags.note(o.tag, p) // it may be what the assignment asks for
	}
	return p, nil, nil
}
