package capturetest

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// TestMemSurvives runs the suite on PinnedMem.
func TestMemSurvives(t *testing.T) {
	RunSurvivor(t, func(_ *testing.T, c Config) *Machine {
		var disks []capture.Disk
		for i, size := range c.Sizes {
			disks = append(disks, capture.Disk{ID: dr.DiskID(i + 1), Size: size})
		}
		k := NewKernel(disks...)
		if c.Ring > 0 {
			k.SetRing(c.Ring)
		}
		m := &Machine{Open: func(o MemOptions) (capture.Survivor, error) { return openPinned(k, o) }}
		for _, d := range disks {
			m.Devices = append(m.Devices, memDevice{k, d})
		}
		return m
	})
}

func openPinned(k *Kernel, o MemOptions) (capture.Survivor, error) {
	p, err := k.Open(o)
	if err != nil {
		return nil, err // not a nil *PinnedMem
	}
	return p, nil
}

// survive runs a seeded history of changes, bulk reads, overflows, closes and kills: each
// process goes on where the last one stood, with what it released gone. It
// returns the first error.
func survive(seed uint64, mistake func(*Replicator, *PinnedMem)) error {
	rng := rand.New(rand.NewPCG(seed, 3))
	k := NewKernel(capture.Disk{ID: 1, Size: 1 << 19}, capture.Disk{ID: 4, Size: 300 * 512})
	k.SetRing(1 << 18)
	o := MemOptions{Hold: true, Memory: 64}
	p, err := k.Open(o)
	if err != nil {
		return err
	}
	w, r := NewWorkload(p.Mem, seed), NewReplicator(p)
	r.During = w.Step
	if err := r.MarkAll(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for range 300 {
		switch n := rng.IntN(20); {
		case n < 8:
			w.Step()
		case n < 13:
			_, err = r.Events(ctx, 0)
		case n < 15 && !r.Exact():
			_, err = r.Bulk(rng.Int64N(200 << 10))
		case n == 15:
			err = r.Close(ctx)
		case n == 16:
			p.Overflow()
		case n < 19:
			p.Release(p.Position())
		case n == 19:
			at := p.Position()
			p.Kill()
			for range rng.IntN(40) { // nobody is there
				w.Step()
			}
			if p, err = k.Open(o); err != nil {
				return err
			}
			if !p.Adopted() {
				return errors.New("not adopted")
			}
			if err := p.Rewind(at); err != nil && !errors.Is(err, dr.ErrNotFound) {
				return err
			}
			r.Adopt(p)
			mistake(r, p)
		}
		if err != nil {
			return err
		}
	}
	r.During = nil
	w.LandAll()
	p.Release(p.Position())
	if err := r.Close(ctx); err != nil {
		return err
	}
	return r.CompareDisks()
}

func TestSurvive(t *testing.T) {
	for seed := range uint64(40) {
		synctest.Test(t, func(t *testing.T) { // waits take no time
			if err := survive(seed, func(*Replicator, *PinnedMem) {}); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		})
	}
}

// TestSurvivePower shows that the history finds mistakes.
func TestSurvivePower(t *testing.T) {
	for name, mistake := range map[string]func(*Replicator, *PinnedMem){
		"dirty ranges are lost": func(_ *Replicator, p *PinnedMem) { p.capture.bitmap.Take(1 << 60) },
		"events are lost": func(_ *Replicator, p *PinnedMem) {
			for p.pos < p.capture.tail() && p.capture.events[p.pos-p.capture.floor].Kind != capture.Lost {
				p.pos++
			}
		},
	} {
		found := 0
		for seed := range uint64(10) {
			synctest.Test(t, func(*testing.T) {
				if survive(seed, mistake) != nil {
					found++
				}
			})
		}
		if t.Logf("%s: found in %d of 10 runs", name, found); found < 6 {
			t.Errorf("%s: found in %d of 10 runs only", name, found)
		}
	}
}

// TestNotedBeforeCleared: when note is called, everything is still in the set.
func TestNotedBeforeCleared(t *testing.T) {
	k := NewKernel(capture.Disk{ID: 1, Size: mib})
	p, err := k.Open(MemOptions{})
	must(t, err)
	must(t, p.Mark(dr.Extent{Disk: 1, Offset: 4096, Length: 3 * 4096}))
	var noted []dr.Extent
	taken, err := p.TakeDirtyNoted(2*4096, func(xs []dr.Extent) {
		noted = append(noted, xs...)
		if n := p.capture.bitmap.Dirty(); n != 3*4096 {
			t.Errorf("%d bytes are dirty when they are noted", n)
		}
	})
	must(t, err)
	if len(taken) != 1 || len(noted) != 1 || taken[0] != noted[0] || taken[0].Length != 2*4096 {
		t.Errorf("noted %v, took %v", noted, taken)
	}
	if n, _ := p.Dirty(); n != 4096 {
		t.Errorf("%d bytes left", n)
	}
}

func TestReboot(t *testing.T) {
	k := NewKernel(capture.Disk{ID: 1, Size: mib})
	p, err := k.Open(MemOptions{Memory: 8})
	must(t, err)
	p.Memory()[0] = 1
	w := p.Submit(1, 0, Pattern(1, 512))
	k.Reboot()
	w.Land()
	if k.Image(1)[0] != 0 {
		t.Error("a write landed after the reboot")
	}
	if _, err := p.Next(t.Context(), 0, nil); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("next after the reboot: %v", err)
	}
	q, err := k.Open(MemOptions{Memory: 8})
	must(t, err)
	if q.Adopted() || len(q.Inherited()) != 0 || q.Memory()[0] != 0 {
		t.Error("something outlived the reboot")
	}
}
