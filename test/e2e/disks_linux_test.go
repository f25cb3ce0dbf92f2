package e2e

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/demo/stage"
	"farside/internal/nbd"
	"farside/internal/testenv"
	"farside/test/load"
)

// threeDisks makes two disks, one of them with sectors of 4 KiB, and a partition on a third.
func threeDisks(t *testing.T, dir string) []string {
	t.Helper()
	attach := func(name string, args ...string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(file, 32<<20); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("losetup", append([]string{"--find", "--show"}, append(args, file)...)...).Output()
		if err != nil {
			t.Fatal(err)
		}
		l := &load.Loop{Device: strings.TrimSpace(string(out)), File: file}
		t.Cleanup(func() {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		})
		return l.Device
	}
	a, b, c := attach("a"), attach("b", "--sector-size", "4096"), attach("c", "--partscan")
	for _, args := range [][]string{{c, "1", "2048", "16384"}, {c, "2", "20480", "16384"}} {
		if out, err := exec.Command("addpart", args...).CombinedOutput(); err != nil {
			t.Fatalf("addpart %v: %v\n%s", args, err, out)
		}
	}
	if _, err := os.Stat(c + "p2"); err != nil {
		node(t, c+"p2")
	}
	return []string{a, b, c + "p2"}
}

// node makes the node of a partition where nobody else does.
func node(t *testing.T, path string) {
	t.Helper()
	text, err := os.ReadFile("/sys/class/block/" + filepath.Base(path) + "/dev")
	if err != nil {
		t.Fatal(err)
	}
	major, minor, _ := strings.Cut(strings.TrimSpace(string(text)), ":")
	if out, err := exec.Command("mknod", path, "b", major, minor).CombinedOutput(); err != nil {
		t.Fatalf("mknod: %v\n%s", err, out)
	}
	t.Cleanup(func() { os.Remove(path) })
}

// TestOrderAcrossDisks: number i is written to a disk that only i decides, and only when
// number i-1 has been written. At no position is a number without all those before it.
func TestOrderAcrossDisks(t *testing.T) {
	t.Parallel()
	testenv.NeedEBPF(t)
	testenv.NeedLoop(t)
	testenv.NeedTool(t, "addpart", "mknod")
	dir := workDir(t)
	disks := threeDisks(t, dir)
	s, err := stage.Raise(t.Context(), stage.Options{Dir: dir, Program: program(t), Driver: "ebpf", Disk: disks[0]})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Strike(); err != nil {
			t.Error(err)
		}
	})
	f := &far{t: t, dir: dir, stage: s}
	for _, d := range disks {
		f.protect(d)
	}
	f.exact(time.Minute)
	before := f.until(time.Minute, "three disks are protected", func(m *farsidev1.Machine) bool {
		return m.GetState() == farsidev1.MachineState_MACHINE_STATE_PROTECTED && len(m.GetDisks()) == 3 && m.GetHead() != nil
	})
	tag, err := s.Far.Tag(t.Context(), "before")
	if err != nil {
		t.Fatal(err)
	}
	order := countUp(t, disks, 3000)
	after, err := s.Far.Tag(t.Context(), "after")
	if err != nil {
		t.Fatal(err)
	}
	highest := uint64(0)
	for _, p := range f.positions(rand.New(rand.NewPCG(9, 9)), 25, tag.GetPosition(), after.GetPosition()) {
		got := f.numbers(p)
		n := max(got[0], got[1], got[2])
		if want := lastOf(order, n); got != want {
			t.Errorf("position %v: the disks hold %v, want %v", p, got, want)
		}
		highest = max(highest, n)
	}
	if highest < 1000 {
		t.Errorf("the highest number at any position is %d", highest)
	}
	t.Logf("3000 numbers on %v; head before %v; the highest at 25 positions was %d", disks, before.GetHead(), highest)
}

// countUp writes the numbers from 1 to n and returns the disk of each.
func countUp(t *testing.T, disks []string, n int) []int {
	t.Helper()
	var fds []int
	for _, d := range disks {
		fd, err := unix.Open(d, unix.O_WRONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		fds = append(fds, fd)
	}
	raw := make([]byte, 8192)
	page := raw[4096-int(uintptr(unsafe.Pointer(&raw[0]))%4096):][:4096]
	rng := rand.New(rand.NewPCG(1, 2))
	var order []int
	for i := range n {
		d := rng.IntN(len(disks))
		binary.LittleEndian.PutUint64(page, uint64(i+1))
		if _, err := unix.Pwrite(fds[d], page, 0); err != nil {
			t.Fatal(err)
		}
		order = append(order, d)
	}
	return order
}

// lastOf returns the last number of each disk when n is the last of all.
func lastOf(order []int, n uint64) (last [3]uint64) {
	for i, d := range order[:min(n, uint64(len(order)))] {
		last[d] = uint64(i + 1)
	}
	return last
}

// numbers reads what the disks hold at a position.
func (f *far) numbers(p *farsidev1.Position) (got [3]uint64) {
	f.t.Helper()
	v := f.open(p, false)
	defer f.close(v)
	exports := v.View.GetStatus().GetExports()
	if len(exports) != len(got) {
		f.t.Fatalf("%d exports", len(exports))
	}
	for i, x := range exports {
		got[i] = f.number(x)
	}
	return got
}

func (f *far) number(x *farsidev1.Export) uint64 {
	f.t.Helper()
	for _, uri := range x.GetUris() {
		if !strings.HasPrefix(uri, "nbd+unix:") && !strings.HasPrefix(uri, "nbd:") {
			continue
		}
		c, err := nbd.Dial(f.t.Context(), uri, nil)
		if err != nil {
			f.t.Fatal(err)
		}
		defer c.Close()
		var b [512]byte
		if _, err := c.ReadAt(b[:], 0); err != nil {
			f.t.Fatal(err)
		}
		return binary.LittleEndian.Uint64(b[:])
	}
	f.t.Fatalf("no uri of %v can be used", x.GetUris())
	return 0
}
