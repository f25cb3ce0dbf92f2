package capturetest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// TestMemConformance runs the suite on Mem, which has no device of its own.
func TestMemConformance(t *testing.T) {
	Run(t, func(t *testing.T, c Config) *Target {
		var disks []capture.Disk
		for i, size := range c.Sizes {
			disks = append(disks, capture.Disk{ID: dr.DiskID(i + 1), Size: size})
		}
		m := NewMem(disks...)
		if c.Ring > 0 {
			m.SetRing(c.Ring)
		}
		target := &Target{Source: m}
		for _, d := range disks {
			target.Devices = append(target.Devices, memDevice{m.Kernel, d})
		}
		return target
	})
}

type memDevice struct {
	m *Kernel
	d capture.Disk
}

func (d memDevice) WriteAt(p []byte, off int64) (int, error) {
	d.m.Write(d.d.ID, off, p)
	return len(p), nil
}

func (d memDevice) Zero(off, n int64) error {
	d.m.Zero(dr.Extent{Disk: d.d.ID, Offset: off, Length: n})
	return nil
}

func (d memDevice) Discard(off, n int64) error {
	d.m.Discard(dr.Extent{Disk: d.d.ID, Offset: off, Length: n})
	return nil
}
func (d memDevice) Flush() error { d.m.Flush(d.d.ID); return nil }

// protocol runs a seeded history of changes, bulk reads, overflows and closes on
// a Mem and checks every exact position. It returns the first error.
func protocol(seed uint64, mistake func(*Replicator)) error {
	rng := rand.New(rand.NewPCG(seed, 2))
	m := NewMem(capture.Disk{ID: 1, Size: 1 << 20}, capture.Disk{ID: 4, Size: 300 * 512})
	m.SetImage(1, Pattern(1<<20, 1<<20))
	m.SetRing(1 << 19)
	w := NewWorkload(m, seed)
	r := NewReplicator(m)
	mistake(r)
	compare := func() error {
		for _, d := range m.Disks() {
			if err := r.Compare(d.ID, w.Oracle.Image(d.ID)); err != nil {
				return err
			}
		}
		return nil
	}
	r.During = w.Step
	positions := 0
	r.OnExact = func(e capture.Event) error {
		if err := w.Oracle.Event(e); err != nil {
			return err
		}
		positions++
		return compare()
	}
	if err := r.MarkAll(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for range 6 {
		for range 40 { // open: changes, events and bulk reads in any order
			w.Step()
			if rng.IntN(60) == 0 {
				m.Overflow()
			}
			if rng.IntN(3) == 0 {
				if _, err := r.Events(ctx, 0); err != nil {
					return err
				}
			}
			if rng.IntN(3) == 0 && !r.Exact() {
				if _, err := r.Bulk(rng.Int64N(200 << 10)); err != nil {
					return err
				}
			}
		}
		if err := r.Close(ctx); err != nil {
			return err
		}
		w.Oracle.Sync()
		if err := compare(); err != nil {
			return fmt.Errorf("closed: %w", err)
		}
		for range 30 { // exact: every event is a position
			w.Step()
			if _, err := r.Events(ctx, 0); err != nil {
				return err
			}
			if !r.Exact() {
				w.Oracle.Sync() // the ring overflowed: no position until the next close
			}
		}
	}
	r.During = nil
	w.LandAll()
	if err := r.Close(ctx); err != nil {
		return err
	}
	if positions == 0 {
		return fmt.Errorf("no exact position was checked")
	}
	return r.CompareDisks()
}

func TestProtocol(t *testing.T) {
	for seed := range uint64(12) {
		if err := protocol(seed, func(*Replicator) {}); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

// TestProtocolPower shows that the history finds mistakes.
func TestProtocolPower(t *testing.T) {
	for name, mistake := range map[string]func(*Replicator){
		"bulk data over captured writes": func(r *Replicator) { r.forgetWritten = true },
		"every 20th change dropped":      func(r *Replicator) { r.dropEvery = 20 },
	} {
		found := 0
		for seed := range uint64(10) {
			if protocol(seed, mistake) != nil {
				found++
			}
		}
		t.Logf("%s: found in %d of 10 runs", name, found)
		if found < 8 {
			t.Errorf("%s: found in %d of 10 runs only", name, found)
		}
	}
}

// TestBulkRace provokes the race that Replicator closes: a captured write that
// a bulk read does not see yet.
func TestBulkRace(t *testing.T) {
	for _, mistake := range []bool{false, true} {
		m := NewMem(capture.Disk{ID: 1, Size: 1 << 16})
		r := NewReplicator(m)
		r.forgetWritten = mistake
		if err := r.MarkAll(); err != nil {
			t.Fatal(err)
		}
		data := Pattern(1, 4096)
		w := m.Submit(1, 8192, data) // captured, not on the disk yet
		if _, err := r.Events(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Bulk(1 << 20); err != nil { // reads what was before
			t.Fatal(err)
		}
		w.Land()
		if err := r.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := r.CompareDisks(); (err != nil) != mistake {
			t.Errorf("mistake %v: %v", mistake, err)
		}
	}
}

// TestLateLanding: a write captured before an overflow lands in bitmap mode, after
// a bulk read of its block; Resume must not pass it.
func TestLateLanding(t *testing.T) {
	m := NewMem(capture.Disk{ID: 1, Size: 1 << 16})
	r := NewReplicator(m)
	w := m.Submit(1, 512, Pattern(1, 512))
	m.Overflow()
	m.Write(1, 1024, Pattern(2, 512)) // marks the block of both
	if _, err := r.Events(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Bulk(1 << 20); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- m.Resume(t.Context()) }()
	select {
	case err := <-done:
		t.Fatalf("resume did not wait: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if s := m.Stats(); s.Settled || s.Mode != capture.ModeData {
		t.Errorf("while waiting: %+v", s)
	}
	w.Land()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := r.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.CompareDisks(); err != nil {
		t.Error(err)
	}
}

func TestResumeStops(t *testing.T) {
	m := NewMem(capture.Disk{ID: 1, Size: 1 << 16})
	m.Overflow()
	m.Submit(1, 0, Pattern(1, 512)) // never lands
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := m.Resume(ctx); err == nil {
		t.Error("resume returned while a write was on its way")
	}
	m.Close()
	if err := m.Resume(t.Context()); err == nil {
		t.Error("resume after close")
	}
}
