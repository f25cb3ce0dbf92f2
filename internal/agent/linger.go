package agent

import (
	"context"
	"errors"
	"time"

	"farside/internal/dr"
)

// lingerFor bounds how long a stream whose source has ended still sends what it has.
const lingerFor = 5 * time.Second

// linger sends what was captured before the source ended: a guest that was shut down
// leaves its last writes behind. err is what the replicator ended with.
func (s *stream) linger(ctx context.Context, err error) {
	if !errors.Is(err, dr.ErrUnavailable) || ctx.Err() != nil || s.rep.phase == Waiting || s.rep.cutFrame() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, lingerFor)
	defer cancel()
	for ctx.Err() == nil {
		changed := s.out.watch()
		if _, frames := s.out.used(); frames == 0 || s.out.starting().generation != s.rep.gen {
			return // all stored, or nobody waits for this stream any more
		}
		sleep(ctx, lingerFor, changed)
	}
}

// departure is how a stream is to end that is asked to.
type departure struct {
	why  error
	mark uint64    // all before it was captured by then, and goes first
	by   time.Time // at the latest
}

// depart asks the stream to end with why, when what was captured until now has been sent, or
// lingerFor is over.
func (s *stream) depart(why error) {
	d := &departure{why: why, mark: s.src.Tail(), by: time.Now().Add(lingerFor)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.leaving == nil {
		s.mu.leaving = d
	}
}

// departed returns why the stream ends now; nil if it does not.
func (s *stream) departed(now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.mu.leaving
	if d == nil || s.rep.phase != Waiting && s.src.Consumed() < d.mark && now.Before(d.by) {
		return nil
	}
	return d.why
}
