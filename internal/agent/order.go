package agent

import (
	"context"
	"fmt"
	"sync/atomic"

	"farside/internal/dr"
)

// order is a tag that somebody on this machine waits for, while he holds the file
// systems still, say. It is placed or not, and whoever waits knows which.
type order struct {
	tag   dr.Tag
	state atomic.Uint32
	at    dr.Position   // when done is closed; zero if the tag was not placed
	done  chan struct{} // closed when the replicator has dealt with it
}

const (
	orderOpen      uint32 = iota
	orderClaimed          // the replicator is placing it
	orderWithdrawn        // nobody waits any more: it must not be placed
)

// claim reports whether the tag may still be placed; then it is.
func (o *order) claim() bool     { return o.state.CompareAndSwap(orderOpen, orderClaimed) }
func (o *order) withdrawn() bool { return o.state.Load() == orderWithdrawn }

func (o *order) placed(p dr.Position) { o.at = p; close(o.done) }
func (o *order) failed()              { close(o.done) }

// place puts a tag into the stream behind everything that was submitted before the
// call, and returns its position. It waits for the stream to be exact, until ctx ends. After
// an error the tag is not in the stream and won't be.
func (s *stream) place(ctx context.Context, t dr.Tag) (dr.Position, error) {
	o := &order{tag: t, done: make(chan struct{})}
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
	if o.at == (dr.Position{}) {
		return o.at, fmt.Errorf("tag %q: the stream begins anew: %w", t.Name, dr.ErrUnavailable)
	}
	return o.at, nil
}
