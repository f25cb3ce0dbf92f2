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
	n, first, steps := number("FARSIDE_HISTORIES", 20), number("FARSIDE_SEED", 1), number("FARSIDE_STEPS", 60)
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

// play runs a history in a bubble.
func play(t *testing.T, h History) (r Result) {
	synctest.Test(t, func(*testing.T) { r = Run(h) })
	return r
}
