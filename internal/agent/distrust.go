package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"farside/internal/blockdev"
	"farside/internal/dr"
)

// compare has everything compared, as soon as the stream stands: the copy may differ for
// that reason.
func (s *stream) compare(why Reason) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.distrust = why
}

// passDistrust hands the wish to compare to the replicator when that can take it.
func (s *stream) passDistrust() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.distrust == "" || s.rep.phase == Waiting {
		return nil
	}
	why := s.mu.distrust
	s.mu.distrust = ""
	return s.rep.distrust(why)
}

// distrust opens the stream and has all disks compared. The ledger says so first: who
// continues after this process compares too.
func (r *replicator) distrust(why Reason) error {
	if err := r.cutFrame(); err != nil {
		return err
	}
	r.led.setWhole(true)
	empty := r.phase == Syncing && r.sync.empty
	r.begin(why)
	r.sync.empty = empty
	for _, d := range r.disks {
		d.Total = d.Size
	}
	r.sync.suspect = true
	r.retreat()
	return nil
}

// compareSuspect begins the comparison that distrust asked for. What was captured before is in
// the stream by now: only an answer about a position behind it all counts, since the change that was missed
// may be newer.
func (r *replicator) compareSuspect() error {
	if !r.sync.suspect {
		return nil
	}
	if err := r.cutFrame(); err != nil {
		return err
	}
	var all []dr.DiskID
	for _, d := range r.disks {
		all = append(all, d.ID)
	}
	if err := r.compare.Begin(r.enc.Cursor().Position, all); err != nil {
		return fmt.Errorf("compare: %w", err)
	}
	r.sync.suspect, r.sync.comparing, r.sync.counted = false, r.compare, false
	return nil
}

// accountEvery is how often the accounts are looked at. A missed
// write is found three to four of these after a disk comes to rest.
const accountEvery = time.Second

// account watches the accounts of the source until ctx ends or the capture must be
// opened anew.
func (s *stream) account(ctx context.Context) error {
	tick := time.NewTicker(accountEvery)
	defer tick.Stop()
	var a accountant
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if err := s.react(a.check(s.reading())); err != nil {
			return err
		}
	}
}

// reading takes the accounts of the source: what is in flight, first and last.
func (s *stream) reading() reading {
	r := reading{Stats: s.src.Stats(), at: time.Now(), inflight: make(map[dr.DiskID]int)}
	if len(r.Disks) == 0 {
		return r
	}
	for _, d := range s.src.Disks() {
		if n, ok := blockdev.InFlight(os.DirFS("/"), canonical(d.Path)); ok {
			r.inflight[d.ID] = n
		}
	}
	return r
}

// react does what the findings ask for.
func (s *stream) react(found []finding) error {
	for _, f := range found {
		s.notices.add(f.notice)
		s.log.Warn(f.text, "code", f.code)
		switch f.reaction {
		case compare:
			s.compare(Reason(f.code))
		case openAnew:
			return fmt.Errorf("%s: %w", f.text, dr.ErrUnavailable)
		}
	}
	if len(found) > 0 {
		s.news()
	}
	return nil
}

// canonical resolves links like those in /dev/disk.
func canonical(path string) string {
	if p, err := filepath.EvalSymlinks(path); err == nil {
		return p
	}
	return path
}
