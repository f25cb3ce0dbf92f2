package scan

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/testenv"
)

// file is a capturetest.Device.
type file struct{ *os.File }

func (f file) Zero(off, n int64) error {
	_, err := f.WriteAt(make([]byte, n), off)
	return err
}
func (f file) Discard(int64, int64) error { return dr.ErrUnsupported }
func (f file) Flush() error               { return f.Sync() }

func newFile(t *testing.T, size int64) file {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return file{f}
}

func open(t *testing.T, o Options, files ...file) *Source {
	t.Helper()
	var disks []capture.Disk
	for i, f := range files {
		disks = append(disks, capture.Disk{ID: dr.DiskID(i + 1), Path: f.Name()})
	}
	s, err := Open(disks, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestConformance(t *testing.T) {
	for name, o := range map[string]Options{
		"memory": {Every: time.Millisecond},
		"files":  {Every: time.Millisecond, Memory: 1, Dir: t.TempDir()},
	} {
		t.Run(name, func(t *testing.T) {
			capturetest.RunMarking(t, func(t *testing.T, c capturetest.Config) *capturetest.Target {
				var files []file
				target := &capturetest.Target{}
				for _, size := range c.Sizes {
					files = append(files, newFile(t, size))
					target.Devices = append(target.Devices, files[len(files)-1])
				}
				target.Source = open(t, o, files...)
				return target
			})
		})
	}
}

// TestConformanceDevice scans a block device below its cache.
func TestConformanceDevice(t *testing.T) {
	testenv.NeedLoop(t)
	capturetest.RunMarking(t, func(t *testing.T, c capturetest.Config) *capturetest.Target {
		target := &capturetest.Target{}
		var files []file
		for _, size := range c.Sizes {
			out, err := exec.Command("losetup", "--find", "--show", newFile(t, size).Name()).Output()
			if err != nil {
				t.Fatal(err)
			}
			path := strings.TrimSpace(string(out))
			t.Cleanup(func() { exec.Command("losetup", "--detach", path).Run() })
			f, err := os.OpenFile(path, os.O_RDWR|os.O_SYNC, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			files = append(files, file{f})
			target.Devices = append(target.Devices, file{f})
		}
		target.Source = open(t, Options{Every: time.Millisecond}, files...)
		return target
	})
}

// drain takes everything over into image, and returns how many bytes that were.
func drain(t *testing.T, s *Source, image []byte) (n int64) {
	t.Helper()
	for {
		xs, err := s.TakeDirty(1 << 20)
		if err != nil {
			t.Fatal(err)
		}
		if len(xs) == 0 {
			return n
		}
		for _, x := range xs {
			if _, err := s.ReadAt(image[x.Offset:x.End()], x.Disk, x.Offset); err != nil {
				t.Fatal(err)
			}
			n += x.Length
		}
	}
}

// TestSecondPassFindsTheChange: only the block that was changed is marked.
func TestSecondPassFindsTheChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 8<<20 + 512
		f := newFile(t, size)
		s := open(t, Options{Every: time.Minute, Rate: 1 << 20}, f)
		image := make([]byte, size)
		if err := s.Mark(dr.Extent{Disk: 1, Length: size}); err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		if n := drain(t, s, image); n != size {
			t.Fatalf("first copy has %d bytes", n)
		}
		time.Sleep(10 * time.Second) // the pass takes 8 s by its rate
		first, err := s.Verify(t.Context())
		if err != nil || first.Sub(begun) > time.Second {
			t.Fatalf("vouches for %v after the beginning, %v", first.Sub(begun), err)
		}
		if _, err := f.WriteAt([]byte("changed"), 3<<20); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("end"), size-3); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if n := drain(t, s, image); n != block+512 {
			t.Errorf("%d bytes were marked, want one block and the last sector", n)
		}
		if _, err := s.Verify(t.Context()); !errors.Is(err, dr.ErrUnavailable) {
			t.Errorf("vouches before the change was proven: %v", err)
		}
		time.Sleep(20 * time.Second)
		second, err := s.Verify(t.Context())
		if err != nil || !second.After(first.Add(time.Minute)) {
			t.Errorf("%v, %v", second.Sub(first), err)
		}
		if now, _ := os.ReadFile(f.Name()); !bytes.Equal(image, now) {
			t.Error("copy differs")
		}
	})
}

// TestNoPointWhileWritten: a disk that is written all the time gets no point, and says so; when it rests it does.
func TestNoPointWhileWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 64 * block
		f := newFile(t, size)
		s := open(t, Options{Every: time.Minute, Rate: 4 << 20, Tries: 2}, f)
		image := make([]byte, size)
		if err := s.Mark(dr.Extent{Disk: 1, Length: size}); err != nil {
			t.Fatal(err)
		}
		gaveUp := 0
		for i := range 400 {
			time.Sleep(100 * time.Millisecond)
			if _, err := f.WriteAt(fmt.Appendf(nil, "%9d", i), 63*block); err != nil {
				t.Fatal(err)
			}
			drain(t, s, image)
			switch at, err := s.Verify(t.Context()); {
			case err == nil:
				t.Fatalf("vouches for %v", at)
			case errors.Is(err, dr.ErrNoPoint):
				gaveUp++
			}
		}
		if gaveUp == 0 {
			t.Error("never gave up")
		}
		for range 700 {
			time.Sleep(100 * time.Millisecond)
			drain(t, s, image)
		}
		if _, err := s.Verify(t.Context()); err != nil {
			t.Errorf("at rest: %v", err)
		}
		if now, _ := os.ReadFile(f.Name()); !bytes.Equal(image, now) {
			t.Error("copy differs")
		}
	})
}

// TestReadsThatDontCount: what a compare reads does not hide a change.
func TestReadsThatDontCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFile(t, 4*block)
		s := open(t, Options{Every: time.Minute}, f)
		image, other := make([]byte, 4*block), make([]byte, 4*block)
		if _, err := s.ReadAt(image, 1, 0); err != nil { // a compare that found all equal
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if _, err := s.Verify(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("changed"), block); err != nil {
			t.Fatal(err)
		}
		if _, err := s.ReadAt(other, 1, 0); err != nil { // somebody looks
			t.Fatal(err)
		}
		time.Sleep(time.Minute + time.Second)
		if n := drain(t, s, image); n != block {
			t.Errorf("%d bytes marked; the change was hidden", n)
		}
	})
}

// TestNeverRead: blocks that the consumer never reads are marked in the end.
func TestNeverRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, Options{Every: time.Minute}, newFile(t, 4*block))
		time.Sleep(time.Hour)
		if n, _ := s.Dirty(); n != 0 {
			t.Fatalf("%d bytes marked before the consumer did anything", n)
		}
		if _, err := s.ReadAt(make([]byte, block), 1, block); err != nil {
			t.Fatal(err)
		}
		time.Sleep(patience + time.Minute)
		if n, _ := s.Dirty(); n != 3*block {
			t.Errorf("%d bytes marked, want 3 blocks", n)
		}
	})
}

func TestDiskChangesItsSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFile(t, 4*block)
		s := open(t, Options{Every: time.Minute}, f)
		if _, err := s.ReadAt(make([]byte, 4*block), 1, 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if err := f.Truncate(3 * block); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Next(t.Context(), 2*time.Minute, nil); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("next: %v", err)
		}
		if _, err := s.Verify(t.Context()); err == nil || errors.Is(err, dr.ErrUnavailable) || errors.Is(err, dr.ErrNoPoint) {
			t.Errorf("verify: %v", err)
		}
	})
}

func TestOpenRefuses(t *testing.T) {
	small := newFile(t, 100)
	good := newFile(t, block)
	for name, c := range map[string]struct {
		disk capture.Disk
		want error
	}{
		"missing": {capture.Disk{Path: "/does/not/exist"}, dr.ErrNotFound},
		"odd":     {capture.Disk{Path: small.Name()}, dr.ErrInvalid},
		"size":    {capture.Disk{Path: good.Name(), Size: 512}, dr.ErrInvalid},
	} {
		if _, err := Open([]capture.Disk{c.disk}, Options{}); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// TestTableModel compares tables in memory and in a file with a map.
func TestTableModel(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		const blocks = 3*sliceSums + 5
		where := rapid.SampledFrom([]string{"", dir}).Draw(t, "dir")
		tab, err := newTable(where, 7, blocks*block-100)
		if err != nil {
			t.Fatal(err)
		}
		defer tab.close()
		model := make(map[int64]sum)
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			b := rapid.Int64Range(0, blocks-1).Draw(t, "block")
			if rapid.Bool().Draw(t, "set?") {
				v := sum{byte(rapid.IntRange(1, 3).Draw(t, "value"))}
				changed, err := tab.set(b, v)
				if err != nil || changed != (model[b] != v) {
					t.Fatalf("set: %v, %v", changed, err)
				}
				model[b] = v
			}
			if got, err := tab.get(b); err != nil || got != model[b] {
				t.Fatalf("block %d: %v, %v; want %v", b, got, err, model[b])
			}
		}
		if tab.known != int64(len(model)) {
			t.Fatalf("known %d, want %d", tab.known, len(model))
		}
	})
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("files are left: %v", left)
	}
}

// BenchmarkPass reads and hashes a file in the page cache.
func BenchmarkPass(b *testing.B) {
	const size = 256 << 20
	path := filepath.Join(b.TempDir(), "disk")
	if err := os.WriteFile(path, bytes.Repeat([]byte("scan"), size/4), 0o600); err != nil {
		b.Fatal(err)
	}
	s, err := Open([]capture.Disk{{ID: 1, Path: path}}, Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	b.SetBytes(size)
	for b.Loop() {
		if _, err := s.pass(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
