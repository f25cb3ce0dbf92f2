package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	blocks "farside/internal/compare"
	"farside/internal/dr"
	"farside/internal/fsmap"
)

// simCompare plays the workers of a comparer, one action at a time, and a vault that
// lies behind the process server.
type simCompare struct {
	*comparer
	busy  bool
	held  []*part    // looked at, not answered yet
	vault []*farSide // what the far side held, oldest first
	asked int
}

func (c *simCompare) start(s *sim) {
	c.comparer, c.held = newComparer(s.source()), nil
	c.shift, c.part, c.read = blocks.MinShift, 24<<10, 8<<10
	c.early, c.lazy = s.early, s.lazy
	if s.spares {
		c.spare = &sparing{kinds: []fsmap.Kind{fsmap.Ext4}, take: s.takeFree, tell: func(notice) {}}
	}
	s.rep.compare = c.comparer
}

// rememberVault notes what a vault that lies behind may answer from.
func (s *sim) rememberVault() {
	if !s.compares {
		return
	}
	if s.cmp.vault = append(s.cmp.vault, s.far.clone()); len(s.cmp.vault) > 8 {
		s.cmp.vault = s.cmp.vault[1:]
	}
}

// compareStep looks at a part, or has one answered; the link may break in between.
func (s *sim) compareStep() error {
	c := &s.cmp
	c.busy = true
	defer func() { c.busy = false }()
	if len(c.held) > 0 && (len(c.held) == compareWorkers || s.rng.IntN(2) == 0) {
		i := s.rng.IntN(len(c.held))
		p := c.held[i]
		c.held = append(c.held[:i], c.held[i+1:]...)
		answer, err := s.answer(p.req)
		if _, err = c.settle(p, answer, err); err != nil && !passing(err) {
			return err
		}
		return nil
	}
	p, _ := c.claim()
	if p == nil {
		return nil
	}
	p.free = p.of.free.of(context.Background(), c.src, p.Disk)
	if p.of.empty {
		_, err := c.settle(p, nil, nil)
		return err
	}
	if err := c.look(p, make([]byte, c.read), func(int64) error { return nil }); err != nil {
		_, err = c.settle(p, nil, err)
		if !errors.Is(err, errRead) {
			return err
		}
		return nil
	}
	c.held = append(c.held, p)
	return nil
}

// answer is what a vault says that stands where the process server stands, or before.
func (s *sim) answer(r *blocks.Request) ([]byte, error) {
	if s.breaks && s.rng.IntN(10) == 0 {
		return nil, dr.ErrUnavailable
	}
	f := s.far
	if n := len(s.cmp.vault); n > 0 && s.rng.IntN(2) == 0 {
		f = s.cmp.vault[s.rng.IntN(n)]
	}
	b, err := r.Encode()
	if err != nil {
		return nil, err
	}
	if r, err = blocks.ParseRequest(b); err != nil {
		return nil, err
	}
	if f.at.Position.Seq < r.Floor.Seq {
		return nil, fmt.Errorf("behind: %w", dr.ErrUnavailable)
	}
	s.cmp.asked++
	return answerFrom(r, f.at.Position, f.disks[r.Disk]), nil
}

func answerFrom(r *blocks.Request, at dr.Position, disk []byte) []byte {
	a, h, sum := blocks.NewAnswer(at, r.Blocks()), blocks.NewHasher(r.Key), 0
	for i, k := range r.Kinds {
		x := r.Block(i)
		b := disk[x.Offset:x.End()]
		if k == blocks.Zero && !blocks.IsZero(b) {
			a.Set(i)
		}
		if k == blocks.Data {
			if h.Sum(b) != r.Sums[sum] {
				a.Set(i)
			}
			sum++
		}
	}
	return a.Encode()
}

// Comparing while writes go on, with a far side that lies behind, loses its newest frames or
// its link, agents that are killed and machines that crash: every point is right, and in the end
// the far side holds what the disks hold.
func TestComparerAgainstOracle(t *testing.T) {
	asked := 0
	rapid.Check(t, func(t *rapid.T) {
		o := drawOptions(t)
		o.compares = true
		sim := newSim(o)
		if err := sim.run(); err != nil {
			t.Fatal(err)
		}
		asked += sim.cmp.asked
	})
	t.Logf("%d answers", asked)
	if asked == 0 {
		t.Error("nothing was compared")
	}
}

// The check above has power.
func TestOracleFindsBadComparers(t *testing.T) {
	for name, o := range map[string]simOptions{
		"any answer counts":       {early: true},
		"differences are ignored": {lazy: true},
	} {
		found := 0
		for seed := range uint64(40) {
			o.seed, o.steps, o.disks, o.written, o.room = seed, 400, 1, 1000, 200<<10
			o.compares, o.reboots = true, true
			err := newSim(o).run()
			if errors.Is(err, errMismatch) {
				found++
			} else if err != nil {
				t.Fatalf("%s, seed %d: %v", name, seed, err)
			}
		}
		t.Logf("%s: %d of 40 histories show it", name, found)
		if found < 2 {
			t.Errorf("%s: %d of 40 histories show it; want at least 2", name, found)
		}
	}
}

// far is a far side for run: it answers from images.
type far struct {
	mu    sync.Mutex
	at    dr.Position
	disks map[dr.DiskID][]byte
	fail  error
	calls int
	bytes int
}

func (f *far) ask(_ context.Context, body []byte) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	if f.fail != nil {
		return nil, f.fail
	}
	r, err := blocks.ParseRequest(body)
	if err != nil {
		return nil, err
	}
	a := answerFrom(r, f.at, f.disks[r.Disk])
	f.bytes += len(body) + len(a)
	return a, nil
}

func (f *far) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = err
}

const runDisk = 40<<20 + 512

// running is a comparer that runs, in a synctest bubble.
func running(t *testing.T, busy func() bool, rate int64) (*comparer, *capturetest.Mem, *far, func()) {
	t.Helper()
	mem := capturetest.NewMem(capture.Disk{ID: 1, Size: runDisk})
	image := bytes.Repeat([]byte("something"), runDisk/9+1)[:runDisk]
	mem.SetImage(1, image)
	f := &far{at: dr.Position{Timeline: 1, Seq: 9}, disks: map[dr.DiskID][]byte{1: bytes.Clone(image)}}
	c := newComparer(mem)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.run(ctx, f.ask, busy, rate); !errors.Is(err, context.Canceled) {
			t.Errorf("run ended with %v", err)
		}
	})
	return c, mem, f, func() { cancel(); wg.Wait() }
}

func idle() bool { return false }

// An unchanged disk costs a fortieth of a percent, one changed byte one block.
func TestCompareRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, mem, f, stop := running(t, idle, 0)
		defer stop()
		for round, differ := range []int64{0, 1} {
			f.mu.Lock()
			if differ > 0 {
				f.disks[1][runDisk-1]++
			}
			f.bytes = 0
			f.mu.Unlock()
			if err := c.Begin(dr.Position{Timeline: 1, Seq: 9}, []dr.DiskID{1}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
			dirty, err := mem.Dirty()
			done, total := c.Progress()
			if !c.Done() || err != nil || (dirty > 0) != (differ > 0) || dirty > 64<<10 || done != runDisk || total != runDisk {
				t.Errorf("round %d: done %t, %d bytes dirty, %d of %d: %v", round, c.Done(), dirty, done, total, err)
			}
			if f.bytes == 0 || f.bytes > runDisk/1000*3/10 {
				t.Errorf("%d bytes travelled for %d", f.bytes, runDisk)
			}
		}
	})
}

// While the far side is away nothing is taken for equal; what it can't compare is sent.
func TestCompareFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, mem, f, stop := running(t, idle, 0)
		defer stop()
		f.set(fmt.Errorf("away: %w", dr.ErrUnavailable))
		if err := c.Begin(f.at, []dr.DiskID{1}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if c.Done() || !errors.Is(c.Fault(), dr.ErrUnavailable) {
			t.Errorf("without a far side: done %t, %v", c.Done(), c.Fault())
		}
		f.set(fmt.Errorf("damaged there: %w", dr.ErrCorrupt))
		time.Sleep(time.Minute)
		if dirty, err := mem.Dirty(); !c.Done() || c.Fault() != nil || err != nil || dirty < runDisk {
			t.Errorf("what can't be compared: done %t, %v, %d dirty, %v", c.Done(), c.Fault(), dirty, err)
		}
	})
}

// A comparer reads no faster than it may, and not while captured writes wait.
func TestCompareThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		wait := true
		c, _, f, stop := running(t, func() bool { mu.Lock(); defer mu.Unlock(); return wait }, 1<<20)
		defer stop()
		if err := c.Begin(f.at, []dr.DiskID{1}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if done, _ := c.Progress(); done > 0 {
			t.Errorf("%d bytes were read beside waiting writes", done)
		}
		mu.Lock()
		wait = false
		mu.Unlock()
		time.Sleep(35 * time.Second)
		if c.Done() {
			t.Error("faster than 1 MiB/s")
		}
		time.Sleep(10 * time.Second)
		if !c.Done() {
			t.Error("slower than 1 MiB/s")
		}
	})
}
