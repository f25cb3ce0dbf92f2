package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/demo/stage"
	"farside/internal/nbd"
	"farside/internal/testenv"
	"farside/test/load"
)

// hermit is an agent that has everything on a disk that it protects: program,
// configuration, data and log. A second disk is protected as well.
type hermit struct {
	far
	agent  *stage.Process
	mounts [2]string
	files  [2]string // behind the disks
	loads  [2]load.Oracle
}

const (
	hermitDisk = 320 << 20
	logTail    = 64 << 10 // of the agent's log, when a test failed
)

func newHermit(t *testing.T) *hermit {
	testenv.NeedEBPF(t)
	testenv.NeedLoop(t)
	testenv.NeedTool(t, "mkfs.ext4", "mount", "umount", "cp")
	h := &hermit{far: far{t: t, dir: workDir(t), fs: "ext4", size: hermitDisk}}
	var devices [2]string
	for i := range h.mounts {
		h.files[i] = filepath.Join(h.dir, fmt.Sprintf("disk%d.img", i))
		l, err := load.NewLoop(h.files[i], hermitDisk)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		devices[i], h.mounts[i] = l.Device, filepath.Join(h.dir, fmt.Sprintf("mnt%d", i))
		if err := l.Format("ext4"); err != nil {
			t.Fatal(err)
		}
		unmount, err := l.Mount(h.mounts[i])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unmount(); err != nil {
				t.Error(err)
			}
		})
	}
	var err error
	h.stage, err = stage.Raise(t.Context(), stage.Options{Dir: h.dir, Program: program(t), Driver: "ebpf", Elsewhere: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.stage.Strike(); err != nil {
			t.Error(err)
		}
	})
	h.moveIn()
	x := &h.stage.Far
	for _, d := range devices {
		if err := errors.Join(x.Offered(t.Context(), d), x.Protect(t.Context(), d, "ebpf")); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

// moveIn starts the agent on the first disk.
func (h *hermit) moveIn() {
	h.t.Helper()
	home := filepath.Join(h.mounts[0], "root")
	conf, err := os.ReadFile(filepath.Join(h.dir, "agent.yaml"))
	if err != nil {
		h.t.Fatal(err)
	}
	text := strings.ReplaceAll(string(conf), filepath.Join(h.dir, "agent"), filepath.Join(home, "agent"))
	err = errors.Join(
		os.Mkdir(home, 0o755), os.WriteFile(home+"/agent.yaml", []byte(text), 0o600),
		exec.Command("cp", "-a", filepath.Join(h.dir, "agent"), home).Run(), exec.Command("cp", h.stage.Program, home+"/farside").Run(),
	)
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command(home+"/farside", "agent", "--config", home+"/agent.yaml", "--log-level", "debug")
	cmd.Dir = home
	if h.agent, err = stage.Start("agent", home+"/agent.log", cmd); err != nil {
		h.t.Fatal(err)
	}
	h.stage.Processes = append(h.stage.Processes, h.agent)
	h.t.Cleanup(func() {
		if text, err := os.ReadFile(home + "/agent.log"); h.t.Failed() {
			h.t.Logf("the agent's log: %v\n%s", err, text[max(0, len(text)-logTail):])
		}
	})
	if err := h.stage.Wait(h.t.Context(), 30*time.Second); err != nil {
		h.t.Fatal(err)
	}
}

// running runs the mixed load on some of the disks while fn runs. It is slowed: at full speed
// two of them write 260 MB/s where the page cache is fast, more than the roles of one machine replicate,
// and after an overflow there would be no exact stream to judge.
func (h *hermit) running(fn func(), disks ...int) {
	h.t.Helper()
	for _, i := range disks {
		stop, err := load.StartSlow(h.mounts[i], 3, &h.loads[i])
		if err != nil {
			h.t.Fatal(err)
		}
		defer func() {
			if err := stop(); err != nil {
				h.t.Error(err)
			}
		}()
	}
	fn()
}

// memory returns lines of the agent's status.
func (h *hermit) memory() string {
	h.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", h.agent.PID()))
	if err != nil {
		h.t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "VmRSS") || strings.HasPrefix(line, "VmLck") || strings.HasPrefix(line, "VmHWM") {
			out = append(out, strings.Join(strings.Fields(line), " "))
		}
	}
	return strings.Join(out, ", ")
}

// disk returns a whole disk at a position.
func (h *hermit) disk(id uint32, at *farsidev1.Position) []byte {
	h.t.Helper()
	ctx, c := h.t.Context(), h.stage.Far.Client
	r, err := c.OpenView(ctx, &farsidev1.OpenViewRequest{
		Machine: h.stage.Far.Machine, Wait: true, DiskIds: []uint32{id},
		Selector: &farsidev1.Selector{Point: &farsidev1.Selector_Position{Position: at}},
	})
	if err != nil {
		h.t.Fatal(err)
	}
	for _, e := range r.GetView().GetStatus().GetExports() {
		for _, uri := range e.GetUris() {
			if e.GetDiskId() != id || !strings.HasPrefix(uri, "nbd+unix:") {
				continue
			}
			d, err := nbd.Dial(ctx, uri, nil)
			if err != nil {
				h.t.Fatal(err)
			}
			b := make([]byte, hermitDisk)
			_, err = io.ReadFull(io.NewSectionReader(d, 0, hermitDisk), b)
			_, closed := c.CloseView(ctx, &farsidev1.CloseViewRequest{View: r.GetView().GetId(), Wait: true})
			if err := errors.Join(err, d.Close(), closed); err != nil {
				h.t.Fatal(err)
			}
			return b
		}
	}
	h.t.Fatalf("disk %d is not in %v", id, r)
	return nil
}

// headEqualsDevices compares both disks with the far side while nothing is written.
func (h *hermit) headEqualsDevices() {
	h.t.Helper()
	var thaws []func() error
	for _, m := range h.mounts {
		thaws = append(thaws, frozen(h.t, m))
	}
	p, err := h.stage.Far.Tag(h.t.Context(), "end")
	var devices [2][]byte
	for i, name := range h.files {
		var read error
		devices[i], read = os.ReadFile(name)
		err = errors.Join(err, read)
	}
	for _, thaw := range thaws {
		err = errors.Join(err, thaw())
	}
	if err != nil {
		h.t.Fatal(err)
	}
	for i, want := range devices {
		got, wrong := h.disk(uint32(i+1), p.GetPosition()), 0
		for at := 0; at < len(want); at += 4096 {
			if string(got[at:at+4096]) != string(want[at:at+4096]) {
				wrong++
			}
		}
		if wrong > 0 {
			h.t.Errorf("disk %d differs from the device in %d blocks of 4 KiB", i+1, wrong)
		}
	}
}

// frozen freezes a file system until thaw is called, or for 30 s at most: a test that waits for what it
// froze itself would never end.
func frozen(t *testing.T, mount string) (thaw func() error) {
	t.Helper()
	release, err := load.Freeze(mount)
	if err != nil {
		t.Fatal(err)
	}
	thaw = sync.OnceValue(release)
	time.AfterFunc(30*time.Second, func() { thaw() })
	return thaw
}

// TestRootFrozen: what the agent lives on is frozen for five seconds, under load there
// and elsewhere: the writes to the other disk go on being replicated all the time.
func TestRootFrozen(t *testing.T) {
	h := newHermit(t)
	h.exact(60 * time.Second)
	h.running(func() {
		time.Sleep(time.Second)
		before := h.exact(30 * time.Second)
		thaw := frozen(t, h.mounts[0])
		began, last, stuck := time.Now(), before.GetNewest().GetTimeNs(), 0
		for time.Since(began) < 5*time.Second {
			time.Sleep(500 * time.Millisecond)
			m, err := h.stage.Far.State(t.Context())
			if err != nil || m.GetState() != farsidev1.MachineState_MACHINE_STATE_PROTECTED {
				t.Errorf("after %s it is %v: %s, %v", time.Since(began), m.GetState(), m.GetReason(), err)
			}
			if m.GetNewest().GetTimeNs() <= last {
				stuck++
			}
			last = m.GetNewest().GetTimeNs()
		}
		h.try("while frozen", crash)
		// A point for which the frozen file system would have to be frozen falls back.
		if p := h.try("frozen already", filesystem); p.GetConsistency() != crash || !strings.Contains(p.GetDetail(), "somebody else holds it frozen") {
			t.Errorf("a point is %v: %q", p.GetConsistency(), p.GetDetail())
		}
		if err := thaw(); err != nil {
			t.Fatal(err)
		}
		if stuck > 5 { // a machine with much else to do may miss some
			t.Errorf("the newest point stood still %d times of 10", stuck)
		}
		after := h.exact(10 * time.Second)
		if n := after.GetCounters().GetResyncs() - before.GetCounters().GetResyncs(); n != 0 {
			t.Errorf("%d syncs were needed", n)
		}
		h.point("thawed", filesystem)
		t.Logf("the agent: %s", h.memory())
	}, 0, 1)
	h.headEqualsDevices()
	text, err := os.ReadFile(filepath.Join(h.mounts[0], "root/agent.log"))
	if err != nil || !strings.Contains(string(text), "somebody else holds it frozen") {
		t.Errorf("the log of the time is not there: %v", err)
	}
}

// TestRootFull: what the agent lives on is full.
func TestRootFull(t *testing.T) {
	h := newHermit(t)
	h.exact(60 * time.Second)
	fill, err := os.Create(filepath.Join(h.mounts[0], "fill"))
	if err != nil {
		t.Fatal(err)
	}
	for size := 1 << 20; size > 0; {
		if _, err := fill.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
	if err := errors.Join(fill.Sync(), fill.Close()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(h.mounts[0], "more"), []byte("x"), 0o600); err == nil {
		t.Fatal("the disk is not full")
	}
	h.running(func() {
		// The new assignment can't be kept, but is worked by.
		_, err := h.stage.Far.Client.ProtectMachine(t.Context(), &farsidev1.ProtectMachineRequest{
			Machine: h.stage.Far.Machine, Points: &farsidev1.PointSchedule{FreezeLimitMs: new(int64(5000))},
		})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		h.point("full", filesystem)
		if p := h.try("no hooks", application); p.GetConsistency() != crash {
			t.Errorf("a point is %v", p.GetConsistency())
		}
	}, 1)
	h.exact(10 * time.Second)
	h.headEqualsDevices()
	if err := h.stage.Ended(); err != nil {
		t.Error(err)
	}
}
