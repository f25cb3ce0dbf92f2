package demo

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farside/internal/testenv"
)

func testDevice(t *testing.T) *device {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedLoop(t)
	dir := t.TempDir()
	d, err := newDevice(t.Context(), filepath.Join(dir, "image"), filepath.Join(dir, "mount"), 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// attached reports whether a loop device has a file.
func attached(t *testing.T, path string) bool {
	t.Helper()
	_, err := os.Stat("/sys/block/" + filepath.Base(path) + "/loop")
	return err == nil
}

func TestDeviceLeavesNothing(t *testing.T) {
	d := testDevice(t)
	if !attached(t, d.path) {
		t.Fatal("not attached")
	}
	if err := os.WriteFile(filepath.Join(d.dir, "file"), []byte("x"), 0o600); err != nil {
		t.Error(err)
	}
	dir := d.dir
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("still mounted, %v", err)
	}
	for deadline := time.Now().Add(5 * time.Second); attached(t, d.path); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("still attached")
		}
	}
}

func TestFrozenHoldsWrites(t *testing.T) {
	d := testDevice(t)
	defer d.Close()
	wrote := make(chan error, 1)
	err := d.frozen(t.Context(), 10*time.Second, func(context.Context) error {
		go func() { wrote <- os.WriteFile(filepath.Join(d.dir, "file"), []byte("x"), 0o600) }()
		select {
		case err := <-wrote:
			return errors.Join(errors.New("a write got through"), err)
		case <-time.After(300 * time.Millisecond):
			return nil
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
}

// TestWatchdogThaws: who froze the file system doesn't thaw it in time.
func TestWatchdogThaws(t *testing.T) {
	d := testDevice(t)
	defer d.Close()
	err := d.frozen(t.Context(), 300*time.Millisecond, func(context.Context) error {
		return os.WriteFile(filepath.Join(d.dir, "file"), []byte("x"), 0o600) // blocks until thawed
	})
	if err == nil || !strings.Contains(err.Error(), "not frozen to the end") {
		t.Errorf("got %v", err)
	}
}

func TestOverwriteGoesBelowTheFileSystem(t *testing.T) {
	d := testDevice(t)
	defer d.Close()
	if err := d.overwrite(t.Context()); err != nil {
		t.Fatal(err)
	}
	f, err := d.openDirect(os.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 4096)
	for off := int64(0); off < d.size; off += 1 << 20 {
		if _, err := (direct{f}).ReadAt(b, off); err != nil || isZero(b) {
			t.Fatalf("at %d lies no noise, %v", off, err)
		}
	}
	if err := d.unmount(); err != nil {
		t.Fatal(err)
	}
	if clean, _ := d.fsck(t.Context()); clean {
		t.Error("noise is a clean file system")
	}
}

// TestDatabaseScene runs load, freeze, disaster and judgement without a far side: the replica is a copy of the disk
// taken while frozen.
func TestDatabaseScene(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedLoop(t)
	dir := t.TempDir()
	s, err := newDatabase(t.Context(), dir, 64<<20, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	}()
	if err := s.begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); s.commits().count() < 50; time.Sleep(10 * time.Millisecond) {
		if err := errors.Join(s.running(), s.commits().refresh()); err != nil || time.Now().After(deadline) {
			t.Fatalf("%d commits, %v", s.commits().count(), err)
		}
	}
	image := filepath.Join(dir, "replica.img")
	var returned int64
	err = s.frozen(t.Context(), func(_ context.Context, disk io.ReaderAt) error {
		if err := s.commits().refresh(); err != nil {
			return err
		}
		returned = s.commits().count()
		f, err := os.Create(image)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(f, io.NewSectionReader(disk, 0, 64<<20))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	what, err := s.disaster(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Log(what)
	j, err := s.judge(t.Context(), image)
	if err != nil {
		t.Fatal(err)
	}
	if !j.OK || j.Fsck != "clean" || j.Rows < returned || j.Opened.IsZero() || j.Sums[databaseName] == "" {
		t.Errorf("%d commits had returned; got %+v", returned, j)
	}
	// The power of the judgement: the overwritten disk itself.
	if out, err := exec.Command("cp", "--sparse=always", filepath.Join(dir, "disk.img"), image).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if j, err := s.judge(t.Context(), image); err != nil || j.OK {
		t.Errorf("noise passes: %+v, %v", j, err)
	}
}
