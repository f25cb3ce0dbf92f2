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
