package agent

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/ebpf"
	"farside/internal/testenv"
)

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// captured makes a loop device of 128 MiB and captures it.
func captured(t *testing.T, args ...string) (device string, src capture.Source) {
	t.Helper()
	testenv.NeedLoop(t)
	testenv.NeedEBPF(t)
	dir, err := os.MkdirTemp("/dev/shm", "farside-accounts-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file := filepath.Join(dir, "disk")
	command(t, "truncate", "-s", "128M", file)
	device = command(t, "losetup", append([]string{"--show", "-f", file}, args...)...)
	t.Cleanup(func() { command(t, "losetup", "-d", device) })
	src, err = ebpf.Open([]capture.Disk{{ID: 1, Path: device}}, ebpf.Options{RingBytes: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := src.Close(); err != nil {
			t.Error(err)
		}
	})
	return device, src
}

// hiding is a Source whose capture has not seen some bytes.
type hiding struct {
	capture.Source
	bytes uint64
}

func (h *hiding) Stats() capture.Stats {
	s := h.Source.Stats()
	for i := range s.Disks {
		s.Disks[i].SeenBytes -= h.bytes
	}
	return s
}

// TestAccountsOfRealLoad: file systems are made, filled, trimmed and left on a captured disk of
// 512 and of 4096 bytes a sector, and the accounts stay silent; then one block is hidden
// from them, and they find it.
func TestAccountsOfRealLoad(t *testing.T) {
	for _, sector := range []string{"512", "4096"} {
		t.Run(sector, func(t *testing.T) {
			t.Parallel()
			device, src := captured(t, "--sector-size", sector)
			h := &hiding{Source: src}
			s := &stream{src: h}
			var a accountant
			look := func() []finding {
				return a.check(s.reading())
			}
			look()
			a.began = a.began.Add(-settling)
			stop, silent := make(chan struct{}), make(chan []finding)
			go func() {
				var found []finding
				for {
					select {
					case <-stop:
						silent <- found
						return
					case <-time.After(50 * time.Millisecond):
						found = append(found, look()...)
					}
				}
			}()
			load(t, device)
			close(stop)
			if found := <-silent; len(found) > 0 {
				t.Fatalf("false alarm: %s", found[0].text)
			}
			rest := func() (found []finding) {
				for range 50 {
					time.Sleep(100 * time.Millisecond)
					found = append(found, look()...)
				}
				return found
			}
			if found := rest(); len(found) > 0 {
				t.Fatalf("false alarm: %s", found[0].text)
			}
			h.bytes = 4096
			found := rest()
			if len(found) != 1 || found[0].code != string(ReasonAccounting) {
				t.Fatalf("a hidden block: %v", found)
			}
			t.Log(found[0].text)
		})
	}
}

// load writes to a device in every way, and leaves it at rest.
func load(t *testing.T, device string) {
	t.Helper()
	dir := t.TempDir()
	for range 2 {
		command(t, "mkfs.ext4", "-q", "-F", device)
		command(t, "mount", device, dir)
		command(t, "dd", "if=/dev/urandom", "of="+dir+"/a", "bs=1M", "count=20", "status=none")
		command(t, "dd", "if=/dev/zero", "of="+dir+"/b", "bs=4k", "count=300", "oflag=direct", "status=none")
		command(t, "cp", dir+"/a", dir+"/c")
		command(t, "rm", dir+"/a")
		command(t, "fstrim", dir)
		command(t, "sync", "-f", dir)
		command(t, "umount", dir)
	}
	command(t, "blkdiscard", "-z", "-o", "4096", "-l", "1048576", device)
	command(t, "dd", "if=/dev/urandom", "of="+device, "bs=64k", "count=40", "oflag=direct", "status=none")
	command(t, "blkdiscard", device)
	command(t, "sync")
}
