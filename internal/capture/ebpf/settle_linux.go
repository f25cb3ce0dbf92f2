//go:build linux && amd64

package ebpf

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"farside/internal/dr"
)

// How long Resume waits for completions that do not come. About one in 10^4 to 10^5
// completions is not shown to the programs on some machines.
const (
	// neverSettled is no state.
	neverSettled = ^uint32(0)
	// givenUp is the state of a write that is not waited for any more. Its note stays for a while: if it completes
	// after all, the programs find that it is of no present state, and overflow. A processor of a
	// guest may stand still for a second anywhere, also between a write's submission and its request.
	givenUp = ^uint32(0) - 2
	// quietAge: a write that is this old, while the driver of its disk has no
	// write at all, has completed unseen. (A younger one may wait for a request.)
	quietAge = 100 * time.Millisecond
	// giveUpAge: so has one of this age. If its completion comes nevertheless, the
	// programs overflow, and all is well again.
	giveUpAge = 10 * time.Second
	// openAge is how long writes that were in flight at Open are waited for if
	// the disk is never quiet.
	openAge = 30 * time.Second
	// leakAge: a captured write of this age has completed unseen; it is only
	// dropped to make room.
	leakAge = time.Minute
	// softAge is how long the submitter of a write that failed softly has for the next try.
	softAge    = 2 * time.Second
	settlePoll = 2 * time.Millisecond
)

// grace returns when every program that runs now has ended: programs of tracepoints
// are read-side critical sections of RCU, and the system call waits for those.
func grace() {
	const global = 1 // MEMBARRIER_CMD_GLOBAL
	if _, _, e := unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0); e != 0 {
		time.Sleep(50 * time.Millisecond) // not available with nohz_full
	}
}

// Resume implements capture.Stream.
func (s *source) Resume(ctx context.Context) error {
	if err := s.enter("resume"); err != nil {
		return err
	}
	defer s.leave()
	if s.opts.BitmapOnly {
		return fmt.Errorf("resume: opened for bitmap mode only: %w", dr.ErrUnsupported)
	}
	s.resuming.Lock()
	defer s.resuming.Unlock()
	if err := s.awaitLostRoom(ctx); err != nil {
		return err
	}
	state := atomic.LoadUint32(s.state)
	if state%2 == 1 {
		s.lost.Lock()
		s.noticeLocked() // its place is below what is captured from here on
		s.lost.Unlock()
		state++
		atomic.StoreUint32(s.state, state) // programs change only even states
		grace()                            // those that saw the odd one have noted their bios
	}
	return s.settle(ctx, state)
}

// Overflow implements capture.Stream.
func (s *source) Overflow() {
	if s.enter("overflow") != nil {
		return
	}
	defer s.leave()
	if state := atomic.LoadUint32(s.state); state%2 == 0 {
		atomic.CompareAndSwapUint32(s.state, state, state+1) // if it fails, a program has left data mode
	}
}

// awaitLostRoom waits until one more Lost can be kept.
func (s *source) awaitLostRoom(ctx context.Context) error {
	for !s.lostRoom() {
		if err := s.pause(ctx); err != nil {
			return err
		}
	}
	return nil
}

// pause waits a little.
func (s *source) pause(ctx context.Context) error {
	select {
	case <-time.After(settlePoll):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-s.life.closed:
		return fmt.Errorf("resume: capture closed: %w", dr.ErrUnavailable)
	}
}

// settle waits until no write is in flight that Resume waits for.
func (s *source) settle(ctx context.Context, state uint32) error {
	if s.span != state+1 {
		// Writes for which there was no place in the table, and which were submitted in
		// this span, are captured: those that come from here on need not be waited for.
		s.span, s.untracked = state+1, atomic.LoadUint64(word64(s.prog.control[controlUntrackedAt:]))
	}
	for {
		if atomic.LoadUint32(s.settled) == state || atomic.LoadUint32(s.state) != state {
			return nil
		}
		stale, err := s.staleWrites(state)
		if err != nil {
			return fmt.Errorf("resume: %w", err)
		}
		if !stale {
			atomic.StoreUint32(s.settled, state)
			return nil
		}
		if err := s.pause(ctx); err != nil {
			return err
		}
	}
}

// staleWrites reports whether writes are in flight whose data is not in the present
// span of data mode. It gives up on those that have been for too long.
func (s *source) staleWrites(state uint32) (bool, error) {
	now := monotonic()
	quiet, err := s.quietDisks()
	if err != nil {
		return true, err
	}
	allQuiet := len(quiet) > 0
	for _, q := range quiet {
		allQuiet = allQuiet && q
	}
	calm := &s.notes().Calm
	if !pending(now, s.opened, openAge, allQuiet) {
		atomic.StoreUint64(calm, 1)
	}
	stale := atomic.LoadUint64(calm) == 0
	stale = stale || s.untracked != 0 && pending(now, s.untracked, s.giveUp, allQuiet)
	err = flights(s.prog.flying, func(at int, f flight) error {
		if f.State == state || f.State == givenUp {
			return nil
		}
		if pending(now, f.Time, s.giveUp, quiet[f.Dev]) {
			stale = true
			return nil
		}
		atomic.AddUint64(&s.notes().Given, 1)
		if err := s.markFlight(f); err != nil {
			return err
		}
		s.giveUpOn(at, f)
		return nil
	})
	return stale, err
}

// pending reports whether a write that was submitted at the time since may still be
// on its way.
func pending(now, since uint64, limit time.Duration, quiet bool) bool {
	age := time.Duration(now - min(since, now))
	return age < limit && !(quiet && age >= quietAge)
}

// quietDisks tells for each whole disk whether its driver has no write now.
func (s *source) quietDisks() (map[uint32]bool, error) {
	quiet := make(map[uint32]bool)
	for _, d := range s.devs {
		if _, ok := quiet[d.dev]; ok {
			continue
		}
		n, err := d.writesInFlight()
		if err != nil {
			return nil, err
		}
		quiet[d.dev] = n == 0
	}
	return quiet, nil
}

// flights calls fn for each write in flight that mem, the programs' table, has; those
// that begin or end meanwhile may be left out.
func flights(mem []byte, fn func(at int, f flight) error) error {
	table := unsafe.Slice((*flight)(unsafe.Pointer(unsafe.SliceData(mem))), uintptr(len(mem))/unsafe.Sizeof(flight{}))
	for i := range table {
		bio := atomic.LoadUint64(&table[i].Bio)
		if bio <= flightBusy {
			continue
		}
		f := flight{
			Bio: bio, From: atomic.LoadUint64(&table[i].From), To: atomic.LoadUint64(&table[i].To),
			Left: atomic.LoadUint64(&table[i].Left), Time: atomic.LoadUint64(&table[i].Time),
			State: atomic.LoadUint32(&table[i].State), Dev: atomic.LoadUint32(&table[i].Dev),
		}
		if atomic.LoadUint64(&table[i].Bio) != bio {
			continue // it ended, and another one may have begun
		}
		if err := fn(i, f); err != nil {
			return err
		}
	}
	return nil
}

// giveUpOn remembers that f, which is at a place of the table, is not waited for.
func (s *source) giveUpOn(at int, f flight) {
	table := unsafe.Slice((*flight)(unsafe.Pointer(&s.prog.flying[0])), len(s.prog.flying)/int(unsafe.Sizeof(f)))
	// If it fails, the place is another write's: no two of one place are of the same state, as this one's is past.
	atomic.CompareAndSwapUint32(&table[at].State, f.State, givenUp)
}

// forget drops the note of f, which is at a place of the table.
func (s *source) forget(at int, f flight) {
	place := word64(s.prog.flying[at*int(unsafe.Sizeof(f)):])
	atomic.CompareAndSwapUint64(place, f.Bio, 0) // if it fails, it has ended
}

// noteSoft takes over a record about a captured write that failed softly; it lies at pos.
func (s *source) noteSoft(x dr.Extent, pos uint64) {
	s.lost.Lock()
	defer s.lost.Unlock()
	s.soft.add(softWrite{x, monotonic() + uint64(softAge), pos})
}

// coverSoft takes over that x was captured again.
func (s *source) coverSoft(x dr.Extent) {
	if len(s.soft.list) == 0 { // only Next, which calls this, changes it
		return
	}
	s.lost.Lock()
	defer s.lost.Unlock()
	s.soft.cover(x)
}

// checkSoft overflows if the next try of a write did not come.
func (s *source) checkSoft() error {
	if !s.soft.due(monotonic()) {
		return nil
	}
	s.Overflow()
	return s.markSoft()
}

// markSoft puts what failed softly and was not written again into the dirty set. A
// Lost is due: nothing is taken from the set before it.
func (s *source) markSoft() error {
	s.lost.Lock()
	defer s.lost.Unlock()
	for _, w := range s.soft.list {
		if err := s.bitmap.Mark(w.extent); err != nil {
			return err
		}
	}
	s.soft.list = nil
	return nil
}

// markFlight puts what f wrote into the dirty set.
func (s *source) markFlight(f flight) error {
	for _, d := range s.devs {
		from, to := max(f.From, d.start), min(f.To, d.end())
		if d.dev != f.Dev || from >= to {
			continue
		}
		x := dr.Extent{Disk: d.disk.ID, Offset: int64(from-d.start) * dr.SectorSize, Length: int64(to-from) * dr.SectorSize}
		if err := s.bitmap.Mark(x); err != nil {
			return err
		}
	}
	return nil
}

// sweep drops writes whose completion was never seen, now and then: those that were captured, and those
// that nobody waits for.
func (s *source) sweep() {
	now := monotonic()
	if now-max(s.swept, s.opened) < uint64(leakAge) {
		return
	}
	s.swept = now
	state := atomic.LoadUint32(s.state)
	// An error only means that it is tried again.
	_ = flights(s.prog.flying, func(at int, f flight) error {
		captured := f.State == state && state%2 == 0
		if !captured && f.State != givenUp || now-min(f.Time, now) < uint64(leakAge) {
			return nil
		}
		s.forget(at, f)
		return nil
	})
}

// awaitBioBased waits for what is in flight at the start on devices without requests:
// how much of a bio they complete can't be seen, so it can't be marked later.
func (s *source) awaitBioBased() error {
	for {
		busy := false
		for _, d := range s.devs {
			n, err := d.writesInFlight()
			if err != nil {
				return err
			}
			busy = busy || n > 0 && !d.mq
		}
		if !busy || monotonic()-s.opened > uint64(openAge) {
			return nil
		}
		time.Sleep(settlePoll)
	}
}
