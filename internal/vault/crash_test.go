package vault

import (
	"context"
	"math/rand/v2"
	"sync"
	"testing"

	"farside/internal/dr"
	"farside/internal/vfs"
)

// snapshot is what a power cut at some call would have left.
type snapshot struct {
	mem    *vfs.Mem
	synced dr.Seq // acknowledged before the call
	op     vfs.Op
}

// TestCrashes cuts the power before calls all over a vault's work, within
// appends, seals, folds and branches, and shows for each that what was
// acknowledged is there, that every position reads right, and that the vault can
// go on.
func TestCrashes(t *testing.T) {
	t.Parallel()
	const seed = 1
	all, m := crashes(t, seed, effort(4, 24, 80))
	for _, c := range all {
		after := &model{mem: c.mem, o: m.o.clone(), opts: m.opts, synced: c.synced}
		after.reopened(t, seed)
		n := len(after.o.frames)
		if n == 0 {
			after.close(t)
			continue
		}
		for range 3 {
			h := after.o.frames[after.src.rng.IntN(n)]
			after.checkPosition(t, h.Last)
		}
		after.checkPosition(t, after.horizon())
		after.discard(t)
		after.append(t, 2)
		after.sync(t)
		if _, err := after.v.FoldTo(context.Background(), after.src.now); err != nil {
			t.Fatalf("fold after a crash before %v: %v", c.op, err)
		}
		after.checkPosition(t, after.horizon())
		after.close(t)
		after.prove(t)
		if t.Failed() {
			t.Fatalf("seed %d, crash before %+v", seed, c.op)
		}
	}
	t.Logf("%d crashes", len(all))
}

// crashes drives a vault and takes a snapshot at one of so many calls.
func crashes(t *testing.T, seed uint64, every int64) ([]snapshot, *model) {
	t.Helper()
	m := newModel(t, seed)
	m.close(t)
	m.opts.SegmentSize = 100 << 10
	var mu sync.Mutex
	var all []snapshot
	rng := rand.New(rand.NewPCG(seed, 3))
	m.acked = make(chan dr.Seq, 1)
	m.acked <- 0
	inject := func(op vfs.Op) error {
		if !op.Kind.Changes() {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if rng.Int64N(every) == 0 {
			synced := <-m.acked
			m.acked <- synced
			all = append(all, snapshot{m.mem.Crash(rng.Uint64()), synced, op})
		}
		return nil
	}
	v, err := Open(context.Background(), vfs.NewFault(m.mem, inject), "/vaults/m", m.opts)
	if err != nil {
		t.Fatal(err)
	}
	m.v = v
	m.src = newSource(seed, v.Log().Cursor())
	if err := m.work(context.Background()); err != nil {
		t.Fatal(err)
	}
	m.close(t)
	mu.Lock()
	defer mu.Unlock()
	return all, m
}
