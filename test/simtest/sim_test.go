package simtest

import (
	"log/slog"
	"os"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/dr"
	"farside/internal/frame"
)

// TestMain makes the compressor's shared state outside of any bubble, since its channels are
// used in all of them.
func TestMain(m *testing.M) {
	c := frame.Cursor{Machine: dr.MachineID{1}, Position: dr.Position{Timeline: 1}}
	e := frame.NewEncoder(c, frame.Zstd)
	e.Begin(frame.Changes, dr.Exact, false)
	_, err := e.Add(dr.Extent{Length: 1 << 20}, dr.Data, 0, make([]byte, 1<<20))
	if err != nil {
		panic(err)
	}
	b, _ := e.Finish()
	f, err := frame.Parse(b)
	for c := range frame.MostCompression + 1 {
		if err == nil {
			_, err = f.Compress(c)
		}
	}
	if err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

func number(name string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return otherwise
}

// TestHistories plays FARSIDE_HISTORIES random histories, from seed FARSIDE_SEED on.
func TestHistories(t *testing.T) {
	many := 300
	if testing.Short() {
		many = 40
	}
	n, first, steps := number("FARSIDE_HISTORIES", many), number("FARSIDE_SEED", 1), number("FARSIDE_STEPS", 60)
	var sum Result
	var mu sync.Mutex
	begin := time.Now()
	t.Run("play", func(t *testing.T) {
		const shards = 4
		for shard := range shards {
			t.Run(strconv.Itoa(shard), func(t *testing.T) {
				t.Parallel()
				for seed := first + shard; seed < first+n; seed += shards {
					h := NewHistory(uint64(seed), steps)
					if os.Getenv("FARSIDE_LOG") != "" {
						h.Config.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
						t.Log(h)
					}
					r := play(t, h)
					if r.Err != nil {
						t.Errorf("seed %d: %v\n%v", seed, r.Err, h)
						return
					}
					mu.Lock()
					sum.Writes += r.Writes
					sum.Looks += r.Looks
					sum.Took += r.Took
					mu.Unlock()
				}
			})
		}
	})
	t.Logf("%d histories, %d writes, %d positions, %v of their time in %v", n, sum.Writes, sum.Looks, sum.Took, time.Since(begin))
}

// found are seeds of histories of 60 steps that found something once: a vault that could not be opened on a full disk
// (27 to 198), a ring that nobody let go of (3335), directories that a power cut took away (2, 7, 9).
var found = []uint64{2, 7, 9, 27, 153, 178, 198, 3335}

// TestFound plays what found something once.
func TestFound(t *testing.T) {
	for _, seed := range found {
		h := NewHistory(seed, 60)
		if r := play(t, h); r.Err != nil {
			t.Errorf("seed %d: %v\n%v", seed, r.Err, h)
		}
	}
}

// TestOracle: what a machine's disks never were is not taken for one of their states.
func TestOracle(t *testing.T) {
	o := newOracle(map[dr.DiskID]int64{1: 8 * dr.SectorSize, 2: 8 * dr.SectorSize})
	image := map[dr.DiskID][]byte{1: make([]byte, 8*dr.SectorSize), 2: make([]byte, 8*dr.SectorSize)}
	write := func(disk dr.DiskID, sector, n int64, zero bool) {
		x := dr.Extent{Disk: disk, Offset: sector * dr.SectorSize, Length: n * dr.SectorSize}
		data := pattern(o.next(), x.Length)
		if zero {
			clear(data)
		}
		copy(image[disk][x.Offset:], data)
		o.record(x, zero)
	}
	write(1, 0, 4, false)
	write(2, 2, 2, false)
	write(1, 3, 2, false)
	if is, err := o.judge(image); err != nil || is != (interval{3, 3}) {
		t.Errorf("%v, %v", is, err)
	}
	before := image[2]
	image[2] = make([]byte, 8*dr.SectorSize) // without the second write, but with the third
	if is, err := o.judge(image); err == nil {
		t.Errorf("a state without its second write is %v", is)
	}
	image[2] = before
	image[1][5] ^= 1
	if is, err := o.judge(image); err == nil {
		t.Errorf("a torn sector is %v", is)
	}
	image[1][5] ^= 1
	write(1, 3, 2, true)
	o.revert(dr.Extent{Disk: 1, Offset: 3 * dr.SectorSize, Length: 2 * dr.SectorSize}, []uint64{3, 3})
	copy(image[1][3*dr.SectorSize:], pattern(3, 2*dr.SectorSize))
	if is, err := o.judge(image); err != nil || is != (interval{3, 5}) {
		t.Errorf("after a write that never landed: %v, %v", is, err)
	}
}

// TestComparesPositions: a later position that is an earlier state is noticed.
func TestComparesPositions(t *testing.T) {
	m := &machine{}
	for i, c := range []struct {
		seq  dr.Seq
		is   interval
		good bool
	}{{10, interval{5, 6}, true}, {20, interval{6, 9}, true}, {30, interval{5, 5}, false}, {5, interval{7, 7}, false}, {15, interval{6, 6}, true}} {
		if err := m.compare(judgement{dr.Position{Timeline: 1, Seq: c.seq}, c.is}); (err == nil) != c.good {
			t.Errorf("%d: %v", i, err)
		}
	}
}

// play runs a history in a bubble.
func play(t *testing.T, h History) (r Result) {
	synctest.Test(t, func(*testing.T) { r = Run(h) })
	return r
}
