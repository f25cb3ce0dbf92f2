package bench

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/demo/stage"
	"farside/internal/testenv"
	"farside/test/load"
	"farside/test/wan"
)

// compareBytes is the size of the disk that is compared: FARSIDE_BENCH_COMPARE_GIB, or 4 GiB, so that
// disk, vault and the peer's copy fit into 16 GiB of memory.
func compareBytes() int64 {
	if n, err := strconv.ParseInt(os.Getenv("FARSIDE_BENCH_COMPARE_GIB"), 10, 64); err == nil && n > 0 {
		return n << 30
	}
	return 4 << 30
}

// TestCompareUnchanged: a disk full of random bytes that has not changed is compared with its copy, since its
// agent was killed; by rsync, from the same file to one on the same disk as the vault. A last round, which does not
// count, changes one block and must send it.
func TestCompareUnchanged(t *testing.T) {
	testenv.NeedBench(t)
	testenv.NeedEBPF(t)
	testenv.NeedLoop(t)
	testenv.NeedTool(t, "rsync")
	size, dir := compareBytes(), t.TempDir()
	loop, err := load.NewLoop(filepath.Join(memoryDir(t), "disk"), size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { loop.Close() })
	fillDisk(t, loop.Device, size)
	s, line := raiseBehind(t, dir)
	f := &s.Far
	if err := errors.Join(f.Offered(t.Context(), loop.Device), f.Protect(t.Context(), loop.Device, "ebpf")); err != nil {
		t.Fatal(err)
	}
	exactAfter(t, s, 0)
	copied := filepath.Join(dir, "copy")
	if out, err := exec.Command("cp", loop.File, copied).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}

	var ours, sum, delta, wire []float64
	for range Rounds() {
		took, sent, _ := compareAgain(t, s, line, nil)
		ours, wire = append(ours, took), append(wire, 100*float64(sent)/float64(size))
		sum = append(sum, rsync(t, loop.File, copied, "--checksum"))
		delta = append(delta, rsync(t, loop.File, copied, "--ignore-times", "--no-whole-file"))
	}
	_, _, read := compareAgain(t, s, line, func() {
		fd, err := unix.Open(loop.Device, unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = unix.Pwrite(fd, make([]byte, 4096), size/2)
		if err := errors.Join(err, unix.Fsync(fd), unix.Close(fd)); err != nil {
			t.Fatal(err)
		}
	})
	if read == 0 || read > 1<<20 {
		t.Errorf("with one block changed %d bytes were read to be sent", read)
	}
	mb := float64(size) / 1e6
	speed := func(seconds []float64) float64 { return mb / Median(seconds) }
	name := "compare an unchanged disk of " + strconv.FormatInt(size>>30, 10) + " GiB"
	for _, p := range []struct {
		peer    string
		seconds []float64
	}{{"rsync --inplace --checksum", sum}, {"rsync --inplace --no-whole-file", delta}} {
		Figure{
			Name: name + " vs " + p.peer, Ours: speed(ours), Peer: speed(p.seconds), Ratio: speed(ours) / speed(p.seconds), Unit: "MB/s", Rounds: Rounds(),
		}.Print()
	}
	Figure{Name: "bytes on the WAN of a comparison of an unchanged disk, both ways, of the disk", Ours: Median(wire), Unit: "%", Rounds: Rounds()}.Print()
}

// fillDisk writes random bytes to a whole device.
func fillDisk(t *testing.T, device string, size int64) {
	t.Helper()
	cmd := exec.Command("openssl", "enc", "-aes-256-ctr", "-pass", "pass:1", "-nosalt", "-in", "/dev/zero")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	dev, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		for n := 0; n < len(buf); {
			m, err := out.Read(buf[n:])
			if n += m; err != nil {
				t.Fatal(err)
			}
		}
		if _, err := dev.WriteAt(buf, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(dev.Sync(), dev.Close(), cmd.Process.Kill()); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
}

// raiseBehind raises the roles with a line for a WAN between process server and master target.
func raiseBehind(t *testing.T, dir string) (*stage.Stage, *wan.Proxy) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mt := l.Addr().String()
	l.Close()
	line, err := wan.Listen(mt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { line.Close() })
	s, err := stage.Raise(t.Context(), stage.Options{
		Dir: dir, Program: program(t, dir, false), Driver: "ebpf",
		Settings: map[string]map[string]string{"master-target": {"listen": mt, "advertise": line.Addr()}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Strike() })
	return s, line
}

// exactAfter waits for a stream that has become exact behind a moment, and returns when its sync began and
// ended there, by the agent's clock.
func exactAfter(t *testing.T, s *stage.Stage, ns int64) (m *farsidev1.Machine, began, ended int64) {
	t.Helper()
	err := stage.Poll(t.Context(), 10*time.Minute, "wait until the stream is exact", func(ctx context.Context) (bool, error) {
		var err error
		m, err = s.Far.State(ctx)
		began, ended = 0, 0
		for _, e := range m.GetEvents() {
			switch {
			case e.GetTimeNs() <= ns:
			case e.GetCode() == "exact":
				ended = e.GetTimeNs()
			case e.GetCode() == "agent-restart":
				began = e.GetTimeNs()
			}
		}
		return ended > 0, errors.Join(err, s.Ended())
	})
	if err != nil {
		t.Fatal(err)
	}
	return m, began, ended
}

// compareAgain has the disk compared, by an agent that comes behind one that was killed, and returns the seconds that
// it took, the bytes on the WAN, and those that were read to be sent. between is called while no agent runs.
func compareAgain(t *testing.T, s *stage.Stage, line *wan.Proxy, between func()) (seconds float64, sent, read int64) {
	t.Helper()
	killed := time.Now().UnixNano()
	if err := s.Halt("agent", true); err != nil {
		t.Fatal(err)
	}
	if between != nil {
		between()
	}
	up, down := line.Bytes()
	if err := s.Again("agent"); err != nil {
		t.Fatal(err)
	}
	m, began, ended := exactAfter(t, s, killed)
	if began == 0 {
		t.Fatalf("no comparison began: %v", m.GetEvents())
	}
	up2, down2 := line.Bytes()
	return float64(ended-began) / 1e9, up2 - up + down2 - down, m.GetCounters().GetBytesRead()
}

// rsync compares two files, and copies what differs, and returns the seconds that it took.
func rsync(t *testing.T, from, to string, flags ...string) float64 {
	t.Helper()
	began := time.Now()
	if out, err := exec.Command("rsync", append(flags, "--inplace", from, to)...).CombinedOutput(); err != nil {
		t.Fatalf("rsync: %v: %s", err, out)
	}
	return time.Since(began).Seconds()
}
