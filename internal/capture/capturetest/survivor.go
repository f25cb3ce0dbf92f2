package capturetest

import (
	"errors"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// Machine is something that processes capture one after the other.
type Machine struct {
	Devices []Device // in the order of Config.Sizes
	Block   int64    // as in Target
	// Open starts a process that captures the disks. Closing what it returns
	// stands for the end of the process, however it comes.
	Open func(o MemOptions) (capture.Survivor, error)
}

// MachineFactory makes a Machine and lets t clean it up.
type MachineFactory func(t *testing.T, c Config) *Machine

// RunSurvivor checks that the Sources of a driver outlive the process that
// opened them.
func RunSurvivor(t *testing.T, f MachineFactory) {
	for _, c := range []struct {
		name string
		test func(*testing.T, MachineFactory)
	}{
		{"Adopt", testAdopt},
		{"Rewind", testRewind},
		{"Hold", testHold},
		{"LostMeanwhile", testLostMeanwhile},
		{"LostAgain", testLostAgain},
		{"Replace", testReplace},
		{"Forget", testForget},
		{"Exclusive", testExclusive},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, f) })
	}
}

// open is Machine.Open for a test.
func (m *Machine) open(t *testing.T, o MemOptions) capture.Survivor {
	t.Helper()
	s, err := m.Open(o)
	must(t, err)
	t.Cleanup(func() { s.Forget(); _ = s.Close() }) // harmless after a Close
	return s
}

func (m *Machine) target(s capture.Survivor) *Target {
	return &Target{Source: s, Devices: m.Devices, Block: m.Block}
}

var holding = MemOptions{Hold: true, Memory: 8192}

func testAdopt(t *testing.T, f MachineFactory) {
	m := f(t, Config{Sizes: []int64{4 * mib, 2 * mib}})
	a := m.open(t, holding)
	if a.Adopted() || len(a.Inherited()) != 0 || len(a.Memory()) != holding.Memory {
		t.Errorf("new: adopted %v, inherited %v, %d bytes of memory", a.Adopted(), a.Inherited(), len(a.Memory()))
	}
	settle(t, a)
	a.Release(a.Position())
	w := newWriter(t, m.target(a))
	for i := range int64(50) {
		w.write(int(i%2), i*4096, 4096)
	}
	w.check(collect(t, a)) // not released: all of it comes again
	a.Memory()[8191] = 42
	must(t, a.Mark(dr.Extent{Disk: 2, Offset: mib, Length: 4096}))
	stats := a.Stats()
	must(t, a.Close())
	w.oracle.Again(50)
	for i := range int64(50) {
		w.write(int(i%2), i*8192, 4096)
	}
	b := m.open(t, holding)
	if !b.Adopted() || len(b.Inherited()) != 2 || b.Memory()[8191] != 42 {
		t.Fatalf("adopted %v, inherited %v", b.Adopted(), b.Inherited())
	}
	if n, err := b.Dirty(); n < 4096 || err != nil {
		t.Errorf("%d bytes dirty, %v", n, err)
	}
	w.check(collect(t, b))
	after := b.Stats()
	if after.Writes != stats.Writes+50 || after.Disks[0].SeenBytes != stats.Disks[0].SeenBytes+25*4096 {
		t.Errorf("stats before %+v, after %+v", stats, after)
	}
}

// positions consumes the stream up to its tail and returns the position of each event.
func positions(t *testing.T, s capture.Survivor) (at []uint64, events []capture.Event) {
	t.Helper()
	ctx := deadline(t, time.Minute)
	for tail := s.Tail(); s.Consumed() < tail; {
		_, err := s.Next(ctx, 10*time.Millisecond, func(e capture.Event) error {
			e.Data = append([]byte(nil), e.Data...)
			at, events = append(at, s.Position()), append(events, e)
			return nil
		})
		must(t, err)
	}
	return at, events
}

func testRewind(t *testing.T, f MachineFactory) {
	m := f(t, Config{Sizes: []int64{4 * mib}})
	s := m.open(t, holding)
	settle(t, s)
	s.Release(s.Position())
	w := newWriter(t, m.target(s))
	const n = 40
	for i := range int64(n) {
		w.write(0, i*8192, 4096)
	}
	at, events := positions(t, s)
	w.check(events)
	if len(at) != n {
		t.Fatalf("%d events of %d writes", len(at), n)
	}
	if err := s.Rewind(at[0]); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("rewind after next: %v", err)
	}
	s.Release(at[10])
	s.Release(at[5]) // nothing: it is gone
	for _, from := range []int{10, 11, 25, n - 1} {
		must(t, s.Close())
		s = m.open(t, holding)
		if err := s.Rewind(at[9]); !errors.Is(err, dr.ErrNotFound) {
			t.Errorf("rewind to what was released: %v", err)
		}
		if err := s.Rewind(s.Tail() + 1); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("rewind to behind the end: %v", err)
		}
		must(t, s.Rewind(at[n-1]))
		must(t, s.Rewind(at[from]))
		if s.Position() != at[from] {
			t.Errorf("at %d after rewind to %d", s.Position(), at[from])
		}
		s.Release(s.Tail()) // nothing: it was not handed over
		again, events := positions(t, s)
		if len(again) != n-from || again[0] != at[from] {
			t.Fatalf("rewound to event %d: %d events at %v", from, len(again), again)
		}
		w.oracle.Again(n - from)
		w.check(events)
	}
	must(t, s.Close())
	s = m.open(t, holding)
	if again, _ := positions(t, s); len(again) != n-10 { // no Rewind: from what was released
		t.Errorf("%d events without a rewind", len(again))
	}
}

func testHold(t *testing.T, f MachineFactory) {
	m := f(t, Config{Sizes: []int64{4 * mib}, Ring: mib})
	s := m.open(t, holding)
	settle(t, s)
	s.Release(s.Position())
	w := newWriter(t, m.target(s))
	for i := 0; s.Stats().Mode == capture.ModeData; i++ { // all is consumed, nothing released
		w.write(0, int64(i%64)*4096, 4096)
		positions(t, s)
		if i > 1000 {
			t.Fatal("the ring never fills")
		}
	}
	if used := s.Stats().RingUsed; used < mib/4 {
		t.Errorf("%d bytes of the ring used when it is full", used)
	}
	positions(t, s)
	ctx := deadline(t, time.Minute)
	must(t, s.Resume(ctx))
	s.Release(s.Position())
	for i := range int64(50) {
		w.write(0, i*4096, 4096)
		positions(t, s)
		s.Release(s.Position())
	}
	if st := s.Stats(); st.Mode != capture.ModeData || st.Overflows != 1 || st.RingUsed > 64<<10 {
		t.Errorf("after the release: %+v", st)
	}
}

// testLostMeanwhile: the ring runs over while there is no process.
func testLostMeanwhile(t *testing.T, f MachineFactory) {
	m := f(t, Config{Sizes: []int64{4 * mib}, Ring: mib})
	s := m.open(t, holding)
	r := NewReplicator(s)
	must(t, r.MarkAll())
	must(t, r.Close(deadline(t, time.Minute)))
	s.Release(s.Position())
	at, w := s.Position(), newWriter(t, m.target(s))
	must(t, s.Close())
	for i := range int64(1000) { // far more than the ring holds
		w.write(0, i%256*4096, 4096)
	}
	s = m.open(t, holding)
	if !s.Adopted() || s.Position() != at || s.Stats().Mode != capture.ModeBitmap {
		t.Fatalf("adopted %v at %d, want %d, %+v", s.Adopted(), s.Position(), at, s.Stats())
	}
	if n, err := s.Dirty(); n == 0 || err != nil {
		t.Errorf("%d bytes dirty, %v", n, err)
	}
	if xs, err := s.TakeDirty(1 << 40); len(xs) > 0 || err != nil {
		t.Errorf("took %v, %v before the lost", xs, err)
	}
	r.Adopt(s)
	for s.Consumed() < s.Tail() {
		_, err := r.Events(deadline(t, time.Minute), 0)
		must(t, err)
	}
	if r.Losts() != 1 || r.Exact() || r.applied < 64 {
		t.Errorf("%d losts, %d changes", r.Losts(), r.applied)
	}
	must(t, r.Close(deadline(t, time.Minute)))
	must(t, r.CompareDisks())
}

// testLostAgain: a Lost that was handed over and released comes again as long as
// there was no return to data mode.
func testLostAgain(t *testing.T, f MachineFactory) {
	m := f(t, Config{Sizes: []int64{4 * mib}, Ring: mib})
	s := m.open(t, holding)
	settle(t, s)
	s.Overflow()
	for range 3 {
		_, events := positions(t, s)
		if n := len(events); n == 0 || events[n-1].Kind != capture.Lost {
			t.Fatalf("%d events, the last is no lost", n)
		}
		s.Release(s.Position())
		must(t, s.Close())
		s = m.open(t, holding)
		must(t, s.Mark(dr.Extent{Disk: 1, Length: 4096}))
		if xs, err := s.TakeDirty(1 << 40); len(xs) > 0 || err != nil {
			t.Errorf("took %v, %v before the lost", xs, err)
		}
	}
	positions(t, s)
	must(t, s.Resume(deadline(t, time.Minute)))
	s.Release(s.Position())
	must(t, s.Close())
	s = m.open(t, holding)
	if _, events := positions(t, s); len(events) > 0 || s.Stats().Mode != capture.ModeData {
		t.Errorf("%v after the return", events)
	}
}

// testReplace: a process that captures other disks misses nothing of those that
// stay.
func testReplace(t *testing.T, f MachineFactory) {
	m := f(t, Config{Sizes: []int64{4 * mib, 4 * mib, 2 * mib}})
	o := holding
	o.Disks = []dr.DiskID{1, 2}
	s := m.open(t, o)
	r := NewReplicator(s)
	must(t, r.MarkAll())
	must(t, r.Close(deadline(t, time.Minute)))
	s.Release(s.Position())
	s.Memory()[7] = 7
	write := func(disk int, off int64) {
		_, err := m.Devices[disk].WriteAt(Pattern(uint64(off)+1, 4096), off)
		must(t, err)
	}
	write(0, 0) // handed over, not released
	write(1, 64<<10)
	positions(t, s)
	write(1, 128<<10) // not handed over
	must(t, s.Mark(dr.Extent{Disk: 2, Offset: mib, Length: 4096}))
	must(t, s.Close())
	write(1, 256<<10) // nobody is there
	o.Disks = []dr.DiskID{2, 3}
	s = m.open(t, o)
	write(1, 512<<10)
	if in := s.Inherited(); s.Adopted() || len(in) != 1 || in[0] != 2 || s.Memory()[7] != 7 {
		t.Fatalf("adopted %v, inherited %v, memory %v", s.Adopted(), in, s.Memory()[:8])
	}
	if n, err := s.Dirty(); n < 4*4096 || n > mib || err != nil {
		t.Errorf("%d bytes dirty, %v", n, err)
	}
	r.Adopt(s)
	must(t, r.MarkDisk(3))
	must(t, r.Close(deadline(t, time.Minute)))
	must(t, r.CompareDisks())
}

func testForget(t *testing.T, f MachineFactory) {
	m := f(t, Config{Sizes: []int64{4 * mib}})
	s := m.open(t, holding)
	s.Memory()[0] = 1
	s.Forget()
	must(t, s.Close())
	s = m.open(t, holding)
	if s.Adopted() || len(s.Inherited()) != 0 || s.Memory()[0] != 0 {
		t.Errorf("adopted %v, inherited %v, memory %d", s.Adopted(), s.Inherited(), s.Memory()[0])
	}
}

func testExclusive(t *testing.T, f MachineFactory) {
	m := f(t, Config{Sizes: []int64{4 * mib}})
	s := m.open(t, holding)
	if _, err := m.Open(holding); !errors.Is(err, dr.ErrExists) {
		t.Errorf("second open: %v", err)
	}
	settle(t, s) // unharmed
}
