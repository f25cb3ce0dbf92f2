package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/link"
	"farside/internal/testenv"
)

const realDisk = 16 << 20

// realFile makes a file with some data and some holes.
func realFile(t *testing.T) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = f.WriteAt(bytes.Repeat([]byte{7}, 3<<20), 5<<20)
	if err := errors.Join(err, f.Truncate(realDisk)); err != nil {
		t.Fatal(err)
	}
	return p
}

// tapped sets a tap in front of a file up.
func tapped(t *testing.T, path string) *drivers {
	t.Helper()
	d, err := openDrivers(CaptureConfig{Driver: driverAuto, Ring: 4 << 20, Tap: TapConfig{
		Socket: filepath.Join(t.TempDir(), "tap"), Disks: []TapDisk{{"other", realFile(t)}, {"disk", path}},
	}}, dr.MachineID{1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// replicateReal writes to a disk that a real driver captures while it is
// replicated, and compares when all is quiet.
func replicateReal(t *testing.T, src opened, disk io.WriterAt, current func() []byte) {
	t.Helper()
	tune := defaultTuning()
	disks := src.src.Disks()
	f := newFakeServer(t, dr.MachineID{1}, disks)
	s := newStream(src.src, streamConfig{
		machine: dr.MachineID{1}, timeline: 1, first: ReasonRestart, used: src.used, tune: tune,
		dial: f.dial, log: slog.New(slog.DiscardHandler), notices: &chronicle{}, news: func() {},
	})
	s.setServer(server{addrs: []string{"server"}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.run(ctx) }()

	var wg sync.WaitGroup
	for g := range 4 { // each in a part of its own: no overlap in flight
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(g)))
			for i := range 400 {
				data := bytes.Repeat([]byte{byte(i + g + 1)}, 4096*(1+rng.IntN(8)))
				off := int64(g)*(realDisk/4) + rng.Int64N((realDisk/4-int64(len(data)))/4096)*4096
				if _, err := disk.WriteAt(data, off); err != nil {
					t.Error(err)
					return
				}
			}
		})
		time.Sleep(10 * time.Millisecond)
	}
	for range 3 { // the server loses all it had: the stream begins anew, amid the writes
		time.Sleep(20 * time.Millisecond)
		f.lose()
	}
	wg.Wait()
	var snap snapshot
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		snap = s.snapshot(time.Now())
		if snap.phase == Exact && snap.durable == snap.built && f.holds(disks[0].ID, current()) {
			break
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("stream: %v", err)
	}
	f.hangUp()
	f.wg.Wait()
	if !f.holds(disks[0].ID, current()) || snap.phase != Exact {
		t.Errorf("the far side differs: %+v", snap)
	}
	t.Logf("%d writes, %d frames, %d overflows, %d syncs", snap.source.Writes, snap.stats.frames, snap.source.Overflows, snap.stats.syncs)
}

// lose makes the server forget everything.
func (f *fakeServer) lose() {
	f.set(func() { f.mu.down = true })
	f.hangUp()
	f.wg.Wait()
	f.set(func() {
		f.mu.down = false
		f.mu.at = frame.Cursor{Machine: f.mu.at.Machine, Position: dr.Position{Timeline: 1}}
		f.progress = link.NewProgress(link.Ack{})
		for _, b := range f.mu.disks {
			clear(b)
		}
	})
}

func (f *fakeServer) holds(id dr.DiskID, image []byte) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return bytes.Equal(f.mu.disks[id], image)
}

func TestReplicateTap(t *testing.T) {
	path := realFile(t)
	d := tapped(t, path)
	src, err := d.open([]capture.Disk{{ID: 9, Path: path, Size: realDisk}}, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	if src.driver != driverTap || src.used || src.src.Disks()[0].ID != 9 {
		t.Errorf("opened %+v", src)
	}
	dev := d.tap.Device(tapID(1))
	current := func() []byte {
		b := make([]byte, realDisk)
		if _, err := dev.ReadAt(b, 0); err != nil {
			t.Error(err)
		}
		return b
	}
	// The other disk of the tap is not replicated, and must not disturb.
	if _, err := d.tap.Device(tapID(0)).WriteAt(sector(1), 0); err != nil {
		t.Fatal(err)
	}
	replicateReal(t, src, dev, current)
	if again, err := d.open([]capture.Disk{{ID: 9, Path: path, Size: realDisk}}, driverTap, 0); err != nil || !again.used {
		t.Errorf("opened again: %+v, %v", again, err)
	}
}

func TestReplicateEBPF(t *testing.T) {
	testenv.NeedEBPF(t)
	testenv.NeedLoop(t)
	file := realFile(t)
	out, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	path := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "--detach", path).Run() })
	d, err := openDrivers(CaptureConfig{Driver: driverAuto, Pin: pinOff}, dr.MachineID{1})
	if err != nil {
		t.Fatal(err)
	}
	src, err := d.open([]capture.Disk{{ID: 3, Path: path, Size: realDisk}}, "", 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer src.src.Close()
	dev, err := os.OpenFile(path, os.O_RDWR|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	replicateReal(t, src, dev, func() []byte {
		b := make([]byte, realDisk)
		if _, err := dev.ReadAt(b, 0); err != nil {
			t.Error(err)
		}
		return b
	})
}

func TestDriversRefuse(t *testing.T) {
	path := realFile(t)
	d := tapped(t, path)
	for name, c := range map[string]struct {
		disk   capture.Disk
		driver string
		want   error
	}{
		"size":           {capture.Disk{ID: 1, Path: path, Size: 512}, "", dr.ErrInvalid},
		"not tapped":     {capture.Disk{ID: 1, Path: path + "x"}, driverTap, dr.ErrNotFound},
		"unknown driver": {capture.Disk{ID: 1, Path: path}, "magic", dr.ErrUnsupported},
	} {
		if _, err := d.open([]capture.Disk{c.disk}, c.driver, 0); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	none, err := openDrivers(CaptureConfig{Driver: driverAuto, Pin: pinOff}, dr.MachineID{1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := none.open([]capture.Disk{{ID: 1, Path: path}}, driverTap, 0); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("tap that is not set up: %v", err)
	}
	if err := none.Close(); err != nil {
		t.Error(err)
	}
}
