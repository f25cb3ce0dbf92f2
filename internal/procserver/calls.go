package procserver

import (
	"context"
	"fmt"

	"farside/internal/dr"
	"farside/internal/link"
)

// setCaller notes how to call the master target.
func (s *stream) setCaller(c *link.Caller) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.target = c
}

// Handle implements link.CallSink: what an agent asks about its machine's copy is
// asked of the master target, over the connection that carries the same machine's frames.
// Body, answer and the number of calls are bounded by the links.
func (k *sink) Handle(ctx context.Context, kind link.CallKind, body []byte) ([]byte, error) {
	if kind != link.CallCompare {
		return nil, fmt.Errorf("call of kind %d by an agent: %w", kind, dr.ErrUnsupported)
	}
	k.s.mu.Lock()
	c := k.s.mu.target
	k.s.mu.Unlock()
	if c == nil {
		return nil, fmt.Errorf("the master target is not connected: %w", dr.ErrUnavailable)
	}
	return c.Call(ctx, kind, body)
}
