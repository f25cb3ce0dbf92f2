package powercut

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"farside/internal/testenv"
	"farside/test/load"
)

// newDisk makes a disk with a file system, mounted at mount.
func newDisk(t *testing.T, mount string, size int64, log *Log) (d *Disk, unmount func() error) {
	t.Helper()
	testenv.NeedLoop(t)
	testenv.NeedTool(t, "mkfs.ext4", "e2fsck")
	if _, err := os.Stat("/dev/fuse"); err != nil {
		testenv.Missing(t, "FUSE")
	}
	d, err := NewDisk(filepath.Join(t.TempDir(), "server"), size, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	l := &load.Loop{Device: d.Device}
	if err := l.Format("ext4"); err != nil {
		t.Fatal(err)
	}
	undo, err := l.Mount(mount)
	if err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	leave := func() (err error) {
		once.Do(func() { err = undo() })
		return err
	}
	t.Cleanup(func() {
		if err := leave(); err != nil {
			t.Error(err)
		}
	})
	return d, leave
}

// TestDiskIsRecorded: the whole log gives the disk, and a file that was fsynced is in every legal state, whole.
func TestDiskIsRecorded(t *testing.T) {
	log := NewLog(256 << 20)
	mount := filepath.Join(t.TempDir(), "mnt")
	d, unmount := newDisk(t, mount, 64<<20, log)
	type written struct {
		name string
		data []byte
		at   int
	}
	rng := rand.New(rand.NewPCG(7, 7))
	var files []written
	for i := range 40 {
		w := written{name: string(rune('a'+i%26)) + string(rune('a'+i/26)), data: bytes.Repeat([]byte{byte(i + 1)}, 1+rng.IntN(100_000))}
		if err := writeSynced(mount, w.name, w.data); err != nil {
			t.Fatal(err)
		}
		w.at = log.Len()
		files = append(files, w)
	}
	if err := unmount(); err != nil {
		t.Fatal(err)
	}
	replay := NewReplay(log)
	if !replay.Whole().Equal(d.Image()) {
		t.Fatal("replaying the whole log doesn't give the disk")
	}
	first, last := files[0].at, log.Len()
	for i := range 20 {
		cut := first + (last-first)*i/20
		m, open := replay.Cut(cut, rand.New(rand.NewPCG(uint64(i), 1)))
		err := mounted(d, m, mount, func() error {
			for _, w := range files {
				if w.at > cut {
					break
				}
				if b, err := os.ReadFile(filepath.Join(mount, w.name)); err != nil || !bytes.Equal(b, w.data) {
					return errors.Join(errors.New(w.name+" is not whole"), err)
				}
			}
			return nil
		})
		if err != nil {
			t.Errorf("cut at %d of %d, %d open: %v", cut, last, open, err)
		}
	}
}

func writeSynced(dir, name string, data []byte) error {
	f, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	d, e := os.Open(dir)
	if e != nil {
		return errors.Join(err, e)
	}
	return errors.Join(err, d.Sync(), d.Close())
}

// mounted mounts m as an administrator's machine would after a power cut, and calls use.
func mounted(d *Disk, m *Image, dir string, use func() error) error {
	d.Use(m)
	if err := unix.Mount(d.Device, dir, "ext4", 0, ""); err != nil {
		return err
	}
	return errors.Join(use(), leave(dir))
}

// leave unmounts dir. A process that another test is just starting may hold what this one had open.
func leave(dir string) (err error) {
	for range 600 {
		if err = unix.Unmount(dir, 0); !errors.Is(err, unix.EBUSY) {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("%w: %w", errStuck, err)
}

// errStuck says that a state can't be unmounted, so no other can be judged.
var errStuck = errors.New("the disk stays in use")
