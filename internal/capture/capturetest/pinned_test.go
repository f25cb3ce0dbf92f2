package capturetest

import (
	"errors"
	"testing"

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
