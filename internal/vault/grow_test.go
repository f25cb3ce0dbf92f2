package vault

import (
	"context"
	"math/rand/v2"
	"sync"
	"testing"

	"farside/internal/vfs"
)

// TestGrowCrashes cuts the power before each call that growing a disk makes: what was
// acknowledged is there, the disk has the old size or the new one, and growing again works.
func TestGrowCrashes(t *testing.T) {
	t.Parallel()
	m := newModel(t, 31)
	m.exactHistory(t, 30)
	m.foldAll(t)
	m.close(t)
	m.reopened(t, 31)
	m.close(t)
	d := testDisks[0]
	d.Size += 10<<20 + 512
	rng := rand.New(rand.NewPCG(31, 4))
	var all []snapshot
	growing := false
	var mu sync.Mutex // the index deletes files from goroutines of its own
	grows := func(yes bool) { mu.Lock(); growing = yes; mu.Unlock() }
	v, err := Open(context.Background(), vfs.NewFault(m.mem, func(op vfs.Op) error {
		mu.Lock()
		defer mu.Unlock()
		if growing && op.Kind.Changes() {
			all = append(all, snapshot{m.mem.Crash(rng.Uint64()), m.synced, op})
		}
		return nil
	}), "/vaults/m", m.opts)
	if err != nil {
		t.Fatal(err)
	}
	grows(true)
	if err := v.AddDisk(d); err != nil {
		t.Fatal(err)
	}
	grows(false)
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	all = append(all, snapshot{m.mem.Crash(1), m.synced, vfs.Op{}})
	sizes := map[int64]int{}
	for _, c := range all {
		after := &model{mem: c.mem, o: m.o.clone(), opts: m.opts, synced: c.synced}
		after.reopened(t, 31)
		size := after.v.Disks()[0].Size
		if sizes[size]++; size != testDisks[0].Size && size != d.Size {
			t.Errorf("crash before %+v: %d bytes", c.op, size)
		}
		if err := after.v.AddDisk(d); err != nil {
			t.Errorf("crash before %+v: %v", c.op, err)
		}
		after.checkPosition(t, after.horizon())
		after.checkPosition(t, after.synced)
		after.append(t, 2)
		after.sync(t)
		after.close(t)
		after.prove(t)
	}
	if last := all[len(all)-1]; sizes[d.Size] == 0 || sizes[testDisks[0].Size] == 0 {
		t.Errorf("sizes %v, the last of %d crashes before %+v", sizes, len(all), last.op)
	}
	t.Logf("%d crashes, sizes %v", len(all), sizes)
}
