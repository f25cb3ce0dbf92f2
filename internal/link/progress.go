package link

import (
	"context"
	"sync"

	"farside/internal/dr"
)

// Progress is how far a sink has come, for those who wait for it. The zero
// value is not ready; see NewProgress. It is safe for concurrent use.
type Progress struct {
	mu struct {
		sync.Mutex
		ack     Ack
		changed chan struct{} // closed at the next change
	}
}

// NewProgress returns a Progress at a.
func NewProgress(a Ack) *Progress {
	p := &Progress{}
	p.mu.ack, p.mu.changed = a, make(chan struct{})
	return p
}

// Raise raises what is stored and what is durable; lower values change nothing.
func (p *Progress) Raise(stored, durable dr.Seq) {
	p.mu.Lock()
	defer p.mu.Unlock()
	next := Ack{max(p.mu.ack.Stored, stored), max(p.mu.ack.Durable, durable)}
	if next != p.mu.ack {
		p.mu.ack = next
		close(p.mu.changed)
		p.mu.changed = make(chan struct{})
	}
}

// Get returns the current state.
func (p *Progress) Get() Ack {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.ack
}

// Wait returns the state as soon as it differs from last.
func (p *Progress) Wait(ctx context.Context, last Ack) (Ack, error) {
	for {
		p.mu.Lock()
		ack, changed := p.mu.ack, p.mu.changed
		p.mu.Unlock()
		if ack != last {
			return ack, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return last, context.Cause(ctx)
		}
	}
}
