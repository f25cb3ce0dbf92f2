//go:build linux

package qemu

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/nbd"
	"farside/internal/testenv"
)

// machine is a QEMU whose CPU never runs: the test writes to its disks with the commands that a guest's
// device would give, by a monitor of its own.
type machine struct {
	t       *testing.T
	cmd     *exec.Cmd
	dir     string
	images  []string
	format  string // of the images; "" is raw
	slow    bool   // writes are held back inside of QEMU, 32 KiB a second
	control *Monitor
	gone    chan struct{}
}

func (m *machine) disk(i int) string { return fmt.Sprintf("drive%d", i+1) }

// start starts a QEMU with raw images of the given sizes.
func start(t *testing.T, sizes ...int64) *machine {
	t.Helper()
	return (&machine{t: t}).start(sizes...)
}

func (m *machine) start(sizes ...int64) *machine {
	t := m.t
	t.Helper()
	testenv.NeedTool(t, "qemu-system-x86_64", "qemu-img")
	m.dir = shortDir(t)
	for i, size := range sizes {
		path := filepath.Join(m.dir, fmt.Sprintf("image%d", i))
		m.format = cmp.Or(m.format, "raw")
		if out, err := exec.Command("qemu-img", "create", "-q", "-f", m.format, path, strconv.FormatInt(size, 10)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		m.images = append(m.images, path)
	}
	m.boot()
	t.Cleanup(m.quit)
	return m
}

func (m *machine) boot() {
	m.t.Helper()
	args := []string{"-nodefaults", "-no-user-config", "-accel", "tcg", "-m", "64", "-display", "none", "-S"}
	for _, name := range []string{"agent", "test"} {
		args = append(args, "-qmp", "unix:"+filepath.Join(m.dir, name)+",server=on,wait=off")
	}
	if m.slow {
		args = append(args, "-object", "throttle-group,id=slow,x-bps-write=32768")
	}
	for i, path := range m.images {
		drive := "format=" + m.format + ",discard=unmap,file=" + path
		if m.slow {
			drive = "driver=throttle,throttle-group=slow,file.driver=raw,file.file.driver=file,file.file.filename=" + path
		}
		args = append(args, "-drive", fmt.Sprintf("if=none,id=%s,%s", m.disk(i), drive),
			"-device", "virtio-blk-pci,drive="+m.disk(i))
	}
	m.cmd = exec.Command("qemu-system-x86_64", args...)
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var errs bytes.Buffer
	m.cmd.Stderr = &errs
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.gone = make(chan struct{})
	go func() {
		defer close(m.gone)
		_ = m.cmd.Wait() // killed by the test
	}()
	var err error
	for range 500 {
		if m.control, err = DialMonitor(m.t.Context(), filepath.Join(m.dir, "test"), nil); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	m.t.Fatalf("qemu does not answer: %v: %s", err, errs.String())
}

func (m *machine) quit() {
	m.control.Close()
	_ = m.cmd.Process.Kill() // may have ended
	<-m.gone
}

// io runs a command of qemu-io on a disk as its device would.
func (m *machine) io(disk int, command string) error {
	var out string
	line := fmt.Sprintf("qemu-io %s %q", m.disk(disk), command)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := m.control.Run(ctx, "human-monitor-command", map[string]any{"command-line": line}, &out); err != nil {
		return err
	}
	if out != "" && !strings.Contains(out, "ops") {
		return errors.New(strings.TrimSpace(out))
	}
	return nil
}

func (m *machine) must(disk int, format string, args ...any) {
	m.t.Helper()
	if err := m.io(disk, fmt.Sprintf(format, args...)); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) guest() *Guest {
	var names []string
	for i := range m.images {
		names = append(names, m.disk(i))
	}
	g := New(Options{Monitor: filepath.Join(m.dir, "agent"), Dir: m.dir, Disks: names})
	m.t.Cleanup(func() { g.Close() })
	return g
}

// open captures all disks; their ids are 3, 4, ….
func open(t *testing.T, g *Guest, queue int64) *Source {
	t.Helper()
	disks, err := g.Disks(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range disks {
		disks[i].ID = dr.DiskID(i + 3)
	}
	s, err := g.Open(t.Context(), disks, queue)
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

func (m *machine) image(i int) []byte {
	m.t.Helper()
	b, err := os.ReadFile(m.images[i])
	if err != nil {
		m.t.Fatal(err)
	}
	return b
}

// replay applies all events that wait to images.
func replay(t *testing.T, s capture.Source, images map[dr.DiskID][]byte) (n int) {
	t.Helper()
	for tail := s.Tail(); s.Consumed() < tail; {
		_, err := s.Next(t.Context(), time.Second, func(e capture.Event) error {
			if e.Kind == capture.Change {
				at := images[e.Extent.Disk][e.Extent.Offset:e.Extent.End()]
				clear(at)
				copy(at, e.Data)
				n++
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return n
}

func TestMirrorIsAStream(t *testing.T) {
	m := start(t, 8<<20, 4<<20)
	m.must(0, "write -P 9 1M 64k") // before the capture
	s := open(t, m.guest(), 0)
	images := map[dr.DiskID][]byte{3: m.image(0), 4: m.image(1)}
	m.must(0, "write -P 1 0 4k")
	m.must(1, "write -P 2 4k 512")
	m.must(0, "write -z 1M 32k")
	m.must(0, "write -P 3 2M 3M")
	m.must(0, "discard 3M 1M")
	m.must(1, "write -f -P 4 512 1k")
	m.must(0, "flush")
	if n := replay(t, s, images); n < 6 {
		t.Errorf("%d changes", n)
	}
	for i, id := range []dr.DiskID{3, 4} {
		if !bytes.Equal(images[id], m.image(i)) {
			t.Errorf("disk %d: the stream gives something else than the image", id)
		}
	}
	p := make([]byte, 4096)
	if _, err := s.ReadAt(p, 3, 1<<20); err != nil || p[0] != 0 {
		t.Errorf("read %d, %v", p[0], err)
	}
	if _, err := s.ReadAt(p, 3, 1<<20+40<<10); err != nil || p[0] != 9 {
		t.Errorf("read %d, %v", p[0], err)
	}
	if at, err := s.Verify(t.Context()); err != nil || time.Since(at) > time.Minute {
		t.Errorf("verify: %v, %v", at, err)
	}
	if st := s.Stats(); st.Mode != capture.ModeData || !st.Settled || st.Detached || st.Overflows != 0 {
		t.Errorf("stats: %+v", st)
	}
}

// TestQcow2: the format of the image is QEMU's business, also that of discards.
func TestQcow2(t *testing.T) {
	m := (&machine{t: t, format: "qcow2"}).start(8 << 20)
	m.must(0, "write -P 9 1M 2M")
	s := open(t, m.guest(), 0)
	images := map[dr.DiskID][]byte{3: make([]byte, 8<<20)}
	if _, err := s.ReadAt(images[3], 3, 0); err != nil {
		t.Fatal(err)
	}
	m.must(0, "write -P 1 512 70k")
	m.must(0, "discard 1M 1M")
	m.must(0, "discard 2096640 1536") // not whole clusters
	m.must(0, "write -z 2500k 300k")
	if n := replay(t, s, images); n < 2 {
		t.Errorf("%d changes", n)
	}
	now := make([]byte, 8<<20)
	if _, err := s.ReadAt(now, 3, 0); err != nil || !bytes.Equal(now, images[3]) {
		t.Errorf("the stream gives something else than the image, %v", err)
	}
	if now[600] != 1 || now[2600<<10] != 0 || now[2<<20+300<<10] != 9 {
		t.Error("the image is not what was written")
	}
	// QEMU 7.2 drops discards while a mirror stands. A QEMU that does not finds this:
	e, err := s.lookup(ourID("target", 3))
	if err != nil {
		t.Fatal(err)
	}
	defer e.Release()
	if err := e.Device.(nbd.Trimmer).Trim(1<<20, 3<<20); err != nil {
		t.Fatal(err)
	}
	clear(images[3][1<<20 : 4<<20])
	if n := replay(t, s, images); n < 3 || !bytes.Equal(now, images[3]) {
		t.Errorf("%d changes by a discard; they are not what it left", n)
	}
}

// TestInFlightAtOpen: a write that was submitted before the mirror stood, and lands late, is not lost.
func TestInFlightAtOpen(t *testing.T) {
	m := (&machine{t: t, slow: true}).start(4 << 20)
	m.must(0, "write -P 1 0 32k") // uses up what goes at once
	m.must(0, "aio_write -P 2 1M 128k")
	p := make([]byte, 128<<10)
	copy(p, m.image(0)[1<<20:])
	if p[len(p)-1] != 0 {
		t.Skip("the write was not held back")
	}
	s := open(t, m.guest(), 0)
	images := map[dr.DiskID][]byte{3: make([]byte, 4<<20)}
	if _, err := s.ReadAt(images[3], 3, 0); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	replay(t, s, images)
	m.must(0, "aio_flush")
	replay(t, s, images)
	if !bytes.Equal(images[3], m.image(0)) {
		t.Error("the write in flight is missing")
	}
	if images[3][1<<20+100] != 2 {
		t.Error("the write is nowhere")
	}
}

// TestReplicate: the smallest consumer gets an exact copy, from a disk full of data, with overflows.
func TestReplicate(t *testing.T) {
	m := start(t, 16<<20)
	m.must(0, "write -P 5 0 16M")
	s := open(t, m.guest(), 2<<20)
	r := capturetest.NewReplicator(s)
	if err := r.MarkAll(); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 60 {
		m.must(0, "write -P %d %dk %dk", rng.IntN(256), rng.IntN(2000)*4, (1+rng.IntN(200))*4)
		if rng.IntN(8) == 0 {
			if _, err := r.Events(t.Context(), time.Millisecond); err != nil {
				t.Fatal(err)
			}
			if _, err := r.Bulk(1 << 20); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.Compare(3, m.image(0)); err != nil {
		t.Error(err)
	}
	if s.Stats().Overflows == 0 {
		t.Error("no overflow: the test shows less than it should")
	}
}
