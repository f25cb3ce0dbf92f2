package agent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
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
	}, dr.MachineID{1})
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
	none, err := openDrivers(CaptureConfig{Driver: driverAuto, Pin: pinOff}, dr.MachineID{1})
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

func TestScanConfig(t *testing.T) {
	c, err := ParseConfig([]byte("data: /d\ncapture: {driver: scan, scan: {every: 90s, rate: 20MiB, tables: /t}}\n"))
	if err != nil || c.Capture.Scan != (ScanConfig{90 * time.Second, 20 << 20, "/t"}) {
		t.Errorf("%+v, %v", c.Capture.Scan, err)
	}
	for _, bad := range []string{"every: 1ms", "every: -1h", "rate: -5", "tables: [a]", "often: true"} {
		if _, err := ParseConfig([]byte("data: /d\ncapture: {scan: {" + bad + "}}\n")); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// TestReplicateScan: the agent's own way, with a file that changes between two scans.
func TestReplicateScan(t *testing.T) {
	path := realFile(t)
	d, err := openDrivers(CaptureConfig{Driver: driverScan, Scan: ScanConfig{Every: time.Second, Tables: t.TempDir()}}, dr.MachineID{1})
	if err != nil {
		t.Fatal(err)
	}
	o, err := d.open([]capture.Disk{{ID: 3, Path: path, Size: realDisk}}, "", 0)
	if err != nil || o.driver != driverScan {
		t.Fatalf("%s, %v", o.driver, err)
	}
	defer o.src.Close()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(sector(7), 5<<20); err != nil {
		t.Fatal(err)
	}
	p := newPipe(t, o.src)
	wait := func(points int) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); len(p.points) < points && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			p.step(1)
		}
		if now, _ := os.ReadFile(path); len(p.points) < points || !bytes.Equal(p.image, now) {
			t.Fatalf("%d points, or the far side differs", len(p.points))
		}
	}
	wait(1)
	read := p.rep.disks[0].Read
	if _, err := f.WriteAt(sector(8), 9<<20); err != nil {
		t.Fatal(err)
	}
	for p.image[9<<20] != 8 && !t.Failed() {
		p.step(1)
		time.Sleep(time.Millisecond)
	}
	wait(len(p.points) + 1)
	if again := p.rep.disks[0].Read - read; again != 64<<10 {
		t.Errorf("%d bytes were read to send one changed sector, want a block", again)
	}
	if _, err := d.open([]capture.Disk{{ID: 3, Path: path + "x"}}, "", 0); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("open of nothing: %v", err)
	}
}

func TestHint(t *testing.T) {
	for system, want := range map[[2]string]string{
		{"linux", "amd64"}: "ebpf", {"linux", "arm64"}: "qemu", {"windows", "amd64"}: "tap, scan",
	} {
		if got := driversOf(system[0], system[1]); !strings.Contains(got, want) || (want != "ebpf" && strings.Contains(got, "ebpf")) {
			t.Errorf("%v: %s", system, got)
		}
	}
	d := &drivers{}
	_, err := d.open([]capture.Disk{{ID: 1, Path: "/x"}}, "magic", 0)
	if !errors.Is(err, dr.ErrUnsupported) || !strings.Contains(err.Error(), "drivers for") {
		t.Errorf("unknown driver: %v", err)
	}
	if err := hint(dr.ErrNotFound); err != dr.ErrNotFound { //nolint:errorlint // must be untouched
		t.Errorf("another error: %v", err)
	}
}
