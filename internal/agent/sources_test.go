package agent

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

func TestQEMUConfig(t *testing.T) {
	for text, want := range map[string]string{
		`{driver: qemu}`:                                                     "no monitor",
		`{driver: qemu, qemu: {monitor: /m}}`:                                "go together",
		`{qemu: {directory: /d, disks: [a]}}`:                                "go together",
		`{qemu: {monitor: /m, directory: /d, disks: [a, a]}}`:                "twice",
		`{qemu: {monitor: /m, directory: /d, disks: [""]}}`:                  "empty",
		`{driver: qemu, qemu: {monitor: /m, directory: /d, disks: [a, b2]}}`: "",
	} {
		_, err := ParseConfig([]byte("data: /d\ncapture: " + text + "\n"))
		switch {
		case want == "" && err != nil:
			t.Errorf("%s: %v", text, err)
		case want != "" && (!errors.Is(err, dr.ErrInvalid) || !strings.Contains(err.Error(), want)):
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// A guest that does not run is offered with the reason why it can't be protected now.
func TestGuestThatDoesNotRun(t *testing.T) {
	dir := t.TempDir()
	d, err := openDrivers(CaptureConfig{
		Driver: driverAuto, QEMU: QEMUConfig{Monitor: dir + "/qmp", Directory: dir + "/sockets", Disks: []string{"a", "b"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	all := d.offered()
	if len(all) != 2 || all[0].path != "qemu:a" || !strings.Contains(all[0].why, "can't be asked") {
		t.Errorf("offered: %+v", all)
	}
	disks := []capture.Disk{{ID: 1, Path: "qemu:a"}}
	if got := d.choose(disks); got != driverQEMU {
		t.Errorf("driver %s", got)
	}
	if _, err := d.open(disks, "", 0); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("open: %v", err)
	}
	none, err := openDrivers(CaptureConfig{Driver: driverAuto})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := none.open(disks, "", 0); !errors.Is(err, dr.ErrInvalid) || none.offered() != nil {
		t.Errorf("without a guest: %v, %v", err, none.offered())
	}
}

// What was captured before the source ended is sent before the stream ends.
func TestLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := fmt.Errorf("source ended: %w", dr.ErrUnavailable)
		src := newMarker(t)
		s := newStream(src, streamConfig{machine: dr.MachineID{7}, timeline: 1, tune: defaultTuning()})
		begun := time.Now()
		s.linger(t.Context(), ended)
		if time.Since(begun) != 0 {
			t.Error("waited although nothing was ever sent")
		}
		p := newPipe(t, src)
		s.out, s.rep = p.out, p.rep
		p.step(3)
		if err := s.rep.addBulk(dr.Extent{Disk: 3, Length: 512}, dr.Data, make([]byte, 512)); err != nil {
			t.Fatal(err)
		}
		go func() {
			time.Sleep(time.Second)
			for b, _ := p.out.take(); b != nil; b, _ = p.out.take() {
				p.apply(b)
			}
			p.out.acked(p.at.Position.Seq, p.at.Position.Seq, time.Now())
		}()
		s.linger(t.Context(), ended)
		if took := time.Since(begun); took != time.Second {
			t.Errorf("waited %v for a frame that took 1 s", took)
		}
		if err := s.rep.addBulk(dr.Extent{Disk: 3, Length: 512}, dr.Data, make([]byte, 512)); err != nil {
			t.Fatal(err)
		}
		s.linger(t.Context(), errors.New("something else"))
		if time.Since(begun) != time.Second {
			t.Error("waited for something else")
		}
		s.linger(t.Context(), ended) // nobody takes the frame
		if took := time.Since(begun); took != time.Second+lingerFor {
			t.Errorf("waited until %v", took)
		}
	})
}
