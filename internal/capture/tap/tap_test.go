package tap

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/nbd"
	"farside/internal/nbd/nbdtest"
)

// TestConformanceDirect runs the suite on the devices of a Tap themselves.
func TestConformanceDirect(t *testing.T) {
	capturetest.Run(t, func(t *testing.T, c capturetest.Config) *capturetest.Target {
		target := &capturetest.Target{}
		var disks []Disk
		for i, size := range c.Sizes {
			disks = append(disks, Disk{ID: dr.DiskID(i + 1), Backing: tempFile(t, size)})
		}
		tap, err := New(disks, c.Ring, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { tap.Close() })
		target.Source = tap
		for _, d := range disks {
			target.Devices = append(target.Devices, writer{tap.Device(d.ID)})
		}
		return target
	})
}

// TestConformanceNBD runs it through client, server and files.
func TestConformanceNBD(t *testing.T) {
	capturetest.Run(t, func(t *testing.T, c capturetest.Config) *capturetest.Target {
		var disks []capture.Disk
		for i, size := range c.Sizes {
			disks = append(disks, capture.Disk{ID: dr.DiskID(i + 1), Path: tempPath(t, size)})
		}
		tap, uri := open(t, Options{Disks: disks, Queue: c.Ring})
		target := &capturetest.Target{Source: tap}
		for _, name := range tap.Names() {
			c := dial(t, uri(name))
			target.Devices = append(target.Devices, writer{c})
		}
		return target
	})
}

// writer is a capturetest.Device over a tapped disk or a client of it.
type writer struct{ disk }

type disk interface {
	WriteAt(p []byte, off int64) (int, error)
	Zero(off, n int64) error
	Trim(off, n int64) error
	Flush() error
}

func (w writer) Discard(off, n int64) error { return w.Trim(off, n) }

func tempPath(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func tempFile(t *testing.T, size int64) *File {
	t.Helper()
	f, err := OpenFile(tempPath(t, size))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func open(t *testing.T, o Options) (*Opened, func(string) string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	var err error
	if o.Listen, err = net.Listen("unix", socket); err != nil {
		t.Fatal(err)
	}
	tap, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tap.Close(); err != nil {
			t.Error(err)
		}
	})
	return tap, func(name string) string {
		return nbd.URI{Network: "unix", Address: socket, Name: name}.String()
	}
}

func dial(t *testing.T, uri string) *nbd.Client {
	t.Helper()
	c, err := nbd.Dial(t.Context(), uri, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// drain replays all events onto images of zeroes.
func drain(t *testing.T, src capture.Source, images map[dr.DiskID][]byte) (events []capture.Event) {
	t.Helper()
	for tail := src.Tail(); src.Consumed() < tail; {
		_, err := src.Next(t.Context(), time.Second, func(e capture.Event) error {
			if e.Kind == capture.Change {
				at := images[e.Extent.Disk][e.Extent.Offset:e.Extent.End()]
				clear(at)
				copy(at, e.Data)
			}
			e.Data = nil
			events = append(events, e)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return events
}

// TestOverlap lets many writers fight for the same sectors: whoever wins on
// the backing must win in the stream.
func TestOverlap(t *testing.T) {
	const size = 64 << 10
	f := tempFile(t, size)
	tap, err := New([]Disk{{ID: 1, Backing: f}}, 64<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	images := map[dr.DiskID][]byte{1: make([]byte, size)}
	for round := range 20 {
		var work sync.WaitGroup
		for g := range 8 {
			work.Go(func() {
				for i := range 20 {
					n := int64(g%3+1) * 4096
					off := int64((g*7+i*5+round)%12) * 4096
					var err error
					switch d := tap.Device(1); {
					case g == 7 && i%4 == 0:
						err = d.Zero(off, n)
					default:
						_, err = d.WriteAt(bytes.Repeat([]byte{byte(1 + g*20 + i)}, int(n)), off)
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		work.Wait()
		drain(t, tap, images)
		got := make([]byte, size)
		if _, err := tap.ReadAt(got, 1, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, images[1]) {
			t.Fatalf("round %d: stream and backing differ", round)
		}
	}
}

// failing is a backing that applies a part of a write and refuses the rest.
type failing struct {
	*File
	fail bool
}

func (f *failing) WriteAt(p []byte, off int64) (int, error) {
	if !f.fail {
		return f.File.WriteAt(p, off)
	}
	n, _ := f.File.WriteAt(p[:len(p)/2], off)
	return n, errors.New("bad sector")
}

// TestRefusedWrite: the stream ends with what is really on the disk.
func TestRefusedWrite(t *testing.T) {
	f := &failing{File: tempFile(t, 1<<20)}
	tap, err := New([]Disk{{ID: 4, Backing: f}}, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	d := tap.Device(4)
	d.WriteAt(bytes.Repeat([]byte{1}, 8192), 0)
	f.fail = true
	if _, err := d.WriteAt(bytes.Repeat([]byte{2}, 8192), 0); err == nil {
		t.Error("the error was lost")
	}
	images := map[dr.DiskID][]byte{4: make([]byte, 1<<20)}
	drain(t, tap, images)
	want := append(bytes.Repeat([]byte{2}, 4096), bytes.Repeat([]byte{1}, 4096)...)
	if !bytes.Equal(images[4][:8192], want) {
		t.Error("the stream says something else than the disk")
	}
	if n, _ := tap.Dirty(); n != 8192 || tap.Stats().Failed != 1 {
		t.Errorf("dirty %d, stats %+v", n, tap.Stats())
	}
}

// slow holds writes back until released.
type slow struct {
	*File
	entered chan struct{}
	leave   chan struct{}
}

func (s *slow) WriteAt(p []byte, off int64) (int, error) {
	s.entered <- struct{}{}
	<-s.leave
	return s.File.WriteAt(p, off)
}

// TestResumeWaits: a write from before the Resume that lands late is waited
// for, and is dirty after it landed.
func TestResumeWaits(t *testing.T) {
	f := &slow{tempFile(t, 8<<20), make(chan struct{}), make(chan struct{})}
	tap, err := New([]Disk{{ID: 1, Backing: f}}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { _, err := tap.Device(1).WriteAt(make([]byte, 4<<20), 0); done <- err }() // more than the queue
	<-f.entered
	if s := tap.Stats(); s.Mode != capture.ModeBitmap || s.Settled {
		t.Fatalf("stats: %+v", s)
	}
	if n, _ := tap.Dirty(); n != 4<<20 {
		t.Errorf("dirty %d when submitted", n)
	}
	tap.TakeDirty(1 << 30)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := tap.Resume(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("resume did not wait: %v", err)
	}
	resumed := make(chan error)
	go func() { resumed <- tap.Resume(t.Context()) }()
	close(f.leave)
	if err := errors.Join(<-done, <-resumed); err != nil {
		t.Fatal(err)
	}
	if n, _ := tap.Dirty(); n != 4<<20 || !tap.Stats().Settled {
		t.Errorf("dirty %d when landed, stats %+v", n, tap.Stats())
	}
}

// TestTwoLosts: overflowing again before anything was consumed is one Lost or
// two, but the stream never forgets it.
func TestTwoLosts(t *testing.T) {
	tap, err := New([]Disk{{ID: 1, Backing: tempFile(t, 1<<20)}}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	d := tap.Device(1)
	for range 2 {
		for tap.Stats().Mode == capture.ModeData {
			d.Zero(0, 512) // takes slots but no bytes
			d.Flush()
		}
		if err := tap.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	events := drain(t, tap, map[dr.DiskID][]byte{1: make([]byte, 1<<20)})
	if last := events[len(events)-1]; last.Kind != capture.Lost || tap.Stats().Overflows != 2 {
		t.Errorf("last event %v, %d overflows", last.Kind, tap.Stats().Overflows)
	}
}

func TestDeviceRefuses(t *testing.T) {
	tap, err := New([]Disk{{ID: 1, Backing: tempFile(t, 1<<20)}}, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	d := tap.Device(1)
	for _, r := range [][2]int64{{-512, 512}, {0, 2 << 20}, {1, 512}, {0, 100}, {512, -512}} {
		if err := d.Zero(r[0], r[1]); !errors.Is(err, nbd.EINVAL) {
			t.Errorf("zero %v: %v", r, err)
		}
	}
	if err := d.Trim(0, 0); err != nil || tap.Tail() != 0 {
		t.Errorf("empty trim: %v, tail %d", err, tap.Tail())
	}
	tap.Close()
	if _, err := d.WriteAt(make([]byte, 512), 0); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("write after close: %v", err)
	}
	if err := tap.Resume(t.Context()); err != nil {
		t.Errorf("resume of a settled source: %v", err)
	}
	if tap.Device(2) != nil {
		t.Error("found a disk that isn't")
	}
}

func TestNewRefuses(t *testing.T) {
	good, odd := tempFile(t, 1<<20), tempFile(t, 1000)
	for _, disks := range [][]Disk{{{ID: 1, Backing: odd}}, {{ID: 1, Backing: good}, {ID: 1, Backing: good}}, {{ID: 1, Backing: tempFile(t, 0)}}} {
		if _, err := New(disks, 0, nil); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%v", err)
		}
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Options{Disks: []capture.Disk{{ID: 1, Path: "/does/not/exist"}}, Listen: l}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("open of nothing: %v", err)
	}
}

func TestExports(t *testing.T) {
	disks := []capture.Disk{{ID: 1, Path: tempPath(t, 1<<20)}, {ID: 7, Path: tempPath(t, 2<<20)}}
	tap, uri := open(t, Options{Disks: disks})
	if c := dial(t, uri("7")); c.Size() != 2<<20 || !c.MultiConn() || c.MinBlock() != dr.SectorSize {
		t.Errorf("size %d, multi-conn %v, block %d", c.Size(), c.MultiConn(), c.MinBlock())
	}
	for _, name := range []string{"", "2", "x", "70000"} {
		if c, err := nbd.Dial(t.Context(), uri(name), nil); !errors.Is(err, nbd.ErrUnknownExport) {
			t.Errorf("%q: %v, %v", name, c, err)
		}
	}
	if names, err := nbd.List(t.Context(), uri(""), nil); err != nil || len(names) != 2 || names[1] != "7" {
		t.Errorf("list: %v, %v", names, err)
	}
	one, uri1 := open(t, Options{Disks: disks[:1]})
	if c := dial(t, uri1("")); c.Size() != 1<<20 {
		t.Errorf("the only disk without a name: %d", c.Size())
	}
	if len(one.Names()) != 1 || len(tap.Disks()) != 2 {
		t.Error("names and disks")
	}
}

// TestJudges: the tap is a good NBD server, and what the judges wrote is in
// the stream.
func TestJudges(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a while")
	}
	const size = 48 << 20
	tap, uri := open(t, Options{Disks: []capture.Disk{{ID: 1, Path: tempPath(t, size)}}, Queue: 1 << 30})
	image := map[dr.DiskID][]byte{1: make([]byte, size)}
	nbdtest.Judge(t, uri(""), size, nbdtest.Options{MinBlock: dr.SectorSize})
	drain(t, tap, image)
	got := make([]byte, size)
	if _, err := tap.ReadAt(got, 1, 0); err != nil || !bytes.Equal(got, image[1]) {
		t.Errorf("stream and disk differ, %v", err)
	}
	if s := tap.Stats(); s.Overflows != 0 || s.Writes == 0 || s.Flushes == 0 {
		t.Errorf("stats: %+v", s)
	}
}
