//go:build linux && amd64

package ebpf

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"farside/internal/capture"
)

// steady writes blocks of 64 KiB with four goroutines, together at rate bytes per second.
func steady(t *testing.T, d *blockDevice, size int64, rate float64) {
	var wg sync.WaitGroup
	quit := make(chan struct{})
	begin := time.Now()
	for g := range int64(4) {
		wg.Go(func() {
			const block = 64 << 10
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			data := aligned(block)
			for n := int64(block); ; n += block {
				select {
				case <-quit:
					return
				default:
				}
				if _, err := d.f.WriteAt(data, g*(size/4)+rng.Int64N(size/4/block)*block); err != nil {
					t.Error(err)
					return
				}
				time.Sleep(time.Duration(float64(n)/(rate/4)*1e9) - time.Since(begin))
			}
		})
	}
	t.Cleanup(func() { close(quit); wg.Wait() })
}

// TestReturnAtSpeed overflows small rings at 500 MB/s and sees how long the return to exact takes:
// it does not depend on the load calming down.
func TestReturnAtSpeed(t *testing.T) {
	const size = 256 << 20
	loop := newLoop(t, size)
	steady(t, openBlock(t, loop), size, 500e6)
	for _, ring := range []int64{1 << 20, 4 << 20, 32 << 20} {
		src := openDisks(t, Options{RingBytes: ring}, loop)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		var reader sync.WaitGroup
		reader.Go(func() {
			data := make([]byte, 0, capture.MaxBatch)
			for ctx.Err() == nil {
				data = data[:0]
				_, err := src.Next(ctx, 10*time.Millisecond, func(e capture.Event) error { data = append(data, e.Data...); return nil })
				if err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}
		})
		var took []time.Duration
		for range 5 {
			src.Overflow()
			begin := time.Now()
			for s := src.Stats(); (s.Mode != capture.ModeData || !s.Settled) && ctx.Err() == nil; s = src.Stats() {
				if err := src.Resume(ctx); err != nil {
					t.Fatalf("ring of %d MiB: %v, %+v", ring>>20, err, src.Stats())
				}
			}
			took = append(took, time.Since(begin).Round(time.Millisecond))
			time.Sleep(50 * time.Millisecond)
		}
		cancel()
		reader.Wait()
		t.Logf("ring of %d MiB: exact again after %v, %d overflows", ring>>20, took, src.Stats().Overflows)
		if slices.Sort(took); took[2] > 2*time.Second {
			t.Errorf("ring of %d MiB: exact again only after %v", ring>>20, took)
		}
		if err := src.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
