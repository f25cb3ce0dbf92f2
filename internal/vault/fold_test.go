package vault

import (
	"context"
	"errors"
	"testing"

	"farside/internal/dr"
	"farside/internal/frame"
)

// exactHistory appends n frames of exact changes, so that every segment ends
// at a recovery point, and syncs.
func (m *model) exactHistory(t fataler, n int) {
	t.Helper()
	for range n {
		f := m.src.frame(frame.Changes, dr.Exact, false, 4)
		if err := m.v.Log().Append(f); err != nil {
			t.Fatalf("append: %v", err)
		}
		m.o.add(f)
	}
	m.sync(t)
}

func (m *model) foldAll(t fataler) int {
	t.Helper()
	n, err := m.v.FoldTo(context.Background(), 1<<62)
	if err != nil {
		t.Fatalf("fold: %v", err)
	}
	return n
}

// TestFoldUnderReaders: an open state keeps what it needs, reads the same
// before and after a fold, also what it has read before, and once it is closed
// the fold goes on.
func TestFoldUnderReaders(t *testing.T) {
	t.Parallel()
	m := newModel(t, 21)
	m.exactHistory(t, 40)
	middle := m.synced
	early, err1 := m.v.At(dr.Position{Timeline: 1, Seq: middle / 2})
	late, err2 := m.v.At(dr.Position{Timeline: 1, Seq: middle})
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	m.exactHistory(t, 40)
	compareState(t, m.o, early, middle/2, m.src.rng, 10)
	compareState(t, m.o, late, middle, m.src.rng, 10)

	first := m.foldAll(t)
	if h := m.horizon(); first == 0 || h > middle/2 {
		t.Fatalf("folded %d segments to %d though %d is open", first, h, middle/2)
	}
	compareState(t, m.o, early, middle/2, m.src.rng, 10)
	early.Close()
	second := m.foldAll(t)
	if h := m.horizon(); second == 0 || h <= middle/2 || h > middle {
		t.Fatalf("folded %d segments to %d, want to between %d and %d", second, h, middle/2, middle)
	}
	compareState(t, m.o, late, middle, m.src.rng, 10)
	m.checkPosition(t, m.horizon())
	m.checkPosition(t, m.horizon()-1)
	late.Close()
	if m.foldAll(t) == 0 {
		t.Error("nothing folded after the last state was closed")
	}
	m.close(t)
	m.prove(t)
}

// TestFoldStops: a cancelled fold is finished by the next one, and nothing is
// folded that ends in an open span or at the time itself.
func TestFoldStops(t *testing.T) {
	t.Parallel()
	m := newModel(t, 22)
	m.exactHistory(t, 40)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := m.v.FoldTo(ctx, 1<<62); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	h := m.horizon()
	if h == 0 || m.v.manifest.Load().Base != 0 {
		t.Fatal("the fold was not under way when it was cancelled")
	}
	m.checkPosition(t, h)
	m.checkPosition(t, m.synced)
	m.close(t)
	m.prove(t)
	m.reopened(t, 23)
	if _, err := m.v.FoldTo(context.Background(), 0); err != nil {
		t.Fatal(err)
	}
	if b := m.v.manifest.Load().Base; b != h {
		t.Errorf("base at %d, want %d", b, h)
	}
	m.checkPosition(t, h)

	open := newModel(t, 24)
	for range 60 {
		f := open.src.frame(frame.Resync, dr.Epoch, true, 4)
		if err := open.v.Log().Append(f); err != nil {
			t.Fatal(err)
		}
		open.o.add(f)
	}
	open.sync(t)
	if n := open.foldAll(t); n != 0 {
		t.Errorf("folded %d segments of an open span", n)
	}
	open.close(t)
}

// TestGrow: a disk may grow under readers and keeps its content.
func TestGrow(t *testing.T) {
	t.Parallel()
	m := newModel(t, 25)
	m.exactHistory(t, 40)
	s, err := m.v.At(dr.Position{Timeline: 1, Seq: m.synced})
	if err != nil {
		t.Fatal(err)
	}
	d := testDisks[0]
	d.Size += 10 << 20
	if err := m.v.AddDisk(d); err != nil {
		t.Fatal(err)
	}
	compareState(t, m.o, s, m.synced, m.src.rng, 5)
	s.Close()
	for what, bad := range map[string]dr.Disk{
		"shrunk": {ID: 0, Size: 512}, "odd": {ID: 9, Size: 1000}, "empty": {ID: 9},
	} {
		if err := m.v.AddDisk(bad); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%s disk: %v", what, err)
		}
	}
	m.foldAll(t)
	m.close(t)
	m.prove(t)
	m.reopened(t, 26)
	if got := m.v.Disks()[0]; got != d {
		t.Errorf("disk %+v after reopening, want %+v", got, d)
	}
	m.checkPosition(t, m.synced)
	m.close(t)
}
