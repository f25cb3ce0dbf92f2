package quiesce

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"farside/internal/dr"
	"farside/internal/testenv"
)

// run runs a program that must succeed and returns what it printed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// loopFS is a mounted file system on a loop device.
type loopFS struct{ device, mount string }

// attach returns a loop device of a file. Others look for free devices at the same
// time, so it may take several attempts.
func attach(t *testing.T, file string) string {
	t.Helper()
	for try := 0; ; try++ {
		out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
		switch {
		case err == nil:
			return strings.TrimSpace(string(out))
		case try == 20:
			t.Fatalf("attach %s: %v: %s", file, err, out)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// newLoopFS makes a file system on a file of dir.
func newLoopFS(t *testing.T, dir, kind string, size int64) loopFS {
	t.Helper()
	testenv.NeedLoop(t)
	testenv.NeedTool(t, "mkfs."+kind, "mount", "umount")
	file := filepath.Join(dir, "fs-"+kind)
	f, err := os.Create(file)
	if err == nil {
		err = errors.Join(f.Truncate(size), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	l := loopFS{mount: filepath.Join(t.TempDir(), "m")}
	l.device = attach(t, file)
	t.Cleanup(func() { run(t, "losetup", "--detach", l.device) })
	run(t, "mkfs."+kind, "-q", l.device)
	if err := os.Mkdir(l.mount, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", l.device, l.mount)
	t.Cleanup(func() {
		l.thaw()
		run(t, "umount", l.mount)
	})
	return l
}

func (l loopFS) ioctl(request uint) error {
	d, err := os.Open(l.mount)
	if err != nil {
		return err
	}
	defer d.Close()
	return ioctl(d.Fd(), request)
}

func (l loopFS) thaw() { l.ioctl(fiThaw) } // it may not be frozen

// frozen asks the kernel by freezing it once more.
func (l loopFS) frozen(t *testing.T) bool {
	t.Helper()
	switch err := l.ioctl(fiFreeze); {
	case errors.Is(err, unix.EBUSY):
		return true
	case err != nil:
		t.Fatalf("ask whether %s is frozen: %v", l.mount, err)
	}
	l.thaw()
	return false
}

func (l loopFS) wantFrozen(t *testing.T, want bool) {
	t.Helper()
	if got := l.frozen(t); got != want {
		t.Errorf("%s frozen: %v, want %v", l.mount, got, want)
	}
}

func (l loopFS) wantThawedWithin(t *testing.T, d time.Duration) {
	t.Helper()
	for end := time.Now().Add(d); l.frozen(t); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s is frozen after %s", l.mount, d)
		}
	}
}

// memory returns a directory in memory.
func memory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "farside-quiesce-")
	if err != nil {
		testenv.Missing(t, "a file system in memory: "+err.Error())
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestKernel(t *testing.T) {
	t.Parallel()
	dir := memory(t)
	host := newLoopFS(t, dir, "ext4", 256<<20)
	other := newLoopFS(t, dir, "xfs", 320<<20)
	nested := newLoopFS(t, host.mount, "ext4", 64<<20)
	for _, l := range []loopFS{host, other, nested} {
		if err := os.WriteFile(l.mount+"/dirty", make([]byte, 8<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Prepare(t.Context(), Options{Disks: []string{host.device, other.device}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Hold(t.Context(), 10*time.Second); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := s.Held(); err != nil {
			t.Error(err)
		}
	}
	for _, l := range []loopFS{host, other, nested} {
		l.wantFrozen(t, true)
	}
	writer := exec.Command("sh", "-c", "echo x > "+nested.mount+"/late") // a write hangs, in another process
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	if _, err := os.Stat(nested.mount + "/late"); err == nil {
		t.Error("a file was made on a frozen file system")
	}
	r, err := s.Release()
	if err != nil || len(r.Frozen) != 3 || r.Frozen[0] != nested.mount {
		t.Errorf("%+v, %v", r, err)
	}
	t.Logf("three file systems were frozen for %s", r.Duration)
	if err := writer.Wait(); err != nil {
		t.Error(err)
	}
	for _, l := range []loopFS{host, other, nested} {
		l.wantFrozen(t, false)
	}
}

// TestOnlyAFileIsMounted: a container may see nothing of a file system but one file.
func TestOnlyAFileIsMounted(t *testing.T) {
	t.Parallel()
	l := newLoopFS(t, memory(t), "ext4", 64<<20)
	file := filepath.Join(t.TempDir(), "file")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.WriteFile(l.mount+"/inner", nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", "--bind", l.mount+"/inner", file)
	t.Cleanup(func() { run(t, "umount", file) })
	run(t, "umount", l.mount)
	t.Cleanup(func() { run(t, "mount", l.device, l.mount) }) // for the other clean-up
	s, err := Prepare(t.Context(), Options{Disks: []string{l.device}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Hold(t.Context(), 5*time.Second); err != nil {
		t.Fatal(err)
	}
	loopFS{mount: file}.wantFrozen(t, true)
	if r, err := s.Release(); err != nil || len(r.Frozen) != 1 || r.Frozen[0] != file {
		t.Errorf("%+v, %v", r, err)
	}
	loopFS{mount: file}.wantFrozen(t, false)
}

// TestOthersFreeze: what somebody else froze is left frozen, and nothing else stays so.
func TestOthersFreeze(t *testing.T) {
	t.Parallel()
	dir := memory(t)
	a, b := newLoopFS(t, dir, "ext4", 64<<20), newLoopFS(t, dir, "xfs", 320<<20)
	s, err := Prepare(t.Context(), Options{Disks: []string{a.device, b.device}})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.ioctl(fiFreeze); err != nil {
		t.Fatal(err)
	}
	if err := s.Hold(t.Context(), 5*time.Second); !errors.Is(err, errFrozen) {
		t.Errorf("Hold: %v", err)
	}
	if _, err := s.Release(); !errors.Is(err, errFrozen) {
		t.Errorf("Release: %v", err)
	}
	a.wantFrozen(t, false)
	b.wantFrozen(t, true)
	b.thaw()
	// Somebody thaws what we froze.
	if s, err = Prepare(t.Context(), Options{Disks: []string{a.device, b.device}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Hold(t.Context(), 5*time.Second); err != nil {
		t.Fatal(err)
	}
	b.thaw()
	if err := s.Held(); !errors.Is(err, errBroken) {
		t.Errorf("Held: %v", err)
	}
	if _, err := s.Release(); !errors.Is(err, errBroken) {
		t.Errorf("Release: %v", err)
	}
	a.wantFrozen(t, false)
	b.wantFrozen(t, false)
}

func TestNoFileSystem(t *testing.T) {
	t.Parallel()
	testenv.NeedLoop(t)
	file := filepath.Join(memory(t), "empty")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	device := attach(t, file)
	defer run(t, "losetup", "--detach", device)
	if _, err := Prepare(t.Context(), Options{Disks: []string{device}}); !errors.Is(err, ErrNothing) {
		t.Errorf("an empty disk: %v", err)
	}
	if _, err := Prepare(t.Context(), Options{Disks: []string{"/dev/none"}}); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("no disk: %v", err)
	}
	if _, err := Prepare(t.Context(), Options{Disks: []string{file}}); !errors.Is(err, ErrNothing) {
		t.Errorf("a file: %v", err)
	}
}

// freezeForTest is the agent that is killed: it freezes disks, says so with the
// pid of its watchdog, and hangs.
func freezeForTest(args []string) {
	limit, err := time.ParseDuration(args[0])
	if err != nil {
		panic(err)
	}
	s, err := Prepare(context.Background(), Options{Disks: args[1:], Ledger: os.Getenv("LEDGER")})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(s.guard.(*process).cmd.Process.Pid)
	io.ReadFull(os.Stdin, make([]byte, 1)) // goes on either way
	err = s.Hold(context.Background(), limit)
	fmt.Println("held", err)
	<-s.mu.over
	fmt.Println("over", s.ended())
	_, err = s.Release()
	fmt.Println("released", err)
}

// victim is a running freezeForTest.
type victim struct {
	*exec.Cmd
	lines    *bufio.Scanner
	stdin    io.WriteCloser
	watchdog int
}

func newVictim(t *testing.T, limit string, disks ...string) *victim {
	t.Helper()
	v := &victim{Cmd: exec.Command("/proc/self/exe", append([]string{agentVerb, limit}, disks...)...)}
	out, err := v.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	v.lines = bufio.NewScanner(out)
	if v.stdin, err = v.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := v.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		v.Process.Kill() // it may be dead
		v.Wait()         // it was killed
		if v.watchdog > 1 {
			unix.Kill(v.watchdog, unix.SIGKILL) // it may be dead, or stopped
			gone(t, v.watchdog)
		}
	})
	line := v.line()
	if _, err := fmt.Sscan(line, &v.watchdog); err != nil {
		t.Fatal(line)
	}
	return v
}

func (v *victim) line() string {
	v.lines.Scan()
	return v.lines.Text()
}

func (v *victim) hold(t *testing.T) string {
	t.Helper()
	if _, err := v.stdin.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	return v.line()
}

// stop stops a process and waits until all of its threads stand.
func stop(t *testing.T, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		running := 0
		for _, name := range threads {
			if text, err := os.ReadFile(name); err == nil && !strings.Contains(string(text), "T (stopped)") {
				running++
			}
		}
		if running == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("process %d does not stop", pid)
		}
	}
}

// gone waits for a process to end; it is not our child.
func gone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); unix.Kill(pid, 0) == nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("process %d lives on", pid)
		}
	}
}

// TestAgentIsKilled: kill -9 of the agent while everything is frozen.
func TestAgentIsKilled(t *testing.T) {
	t.Parallel()
	dir := memory(t)
	a, b := newLoopFS(t, dir, "ext4", 64<<20), newLoopFS(t, dir, "xfs", 320<<20)
	for range 3 {
		v := newVictim(t, "60s", a.device, b.device)
		if got := v.hold(t); got != "held <nil>" {
			t.Fatal(got)
		}
		a.wantFrozen(t, true)
		b.wantFrozen(t, true)
		unix.Kill(v.watchdog, unix.SIGTERM) // is ignored
		unix.Kill(v.watchdog, unix.SIGHUP)  // is ignored
		began := time.Now()
		if err := v.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		a.wantThawedWithin(t, 2*time.Second)
		b.wantThawedWithin(t, 2*time.Second)
		t.Logf("thawed %s after the kill", time.Since(began).Round(time.Millisecond))
		gone(t, v.watchdog)
	}
}

// TestBothAreKilled: agent and watchdog die at the same moment. The next agent thaws, whoever
// it is.
func TestBothAreKilled(t *testing.T) {
	dir := memory(t)
	t.Setenv("LEDGER", dir+"/frozen")
	a := newLoopFS(t, dir, "ext4", 64<<20)
	v := newVictim(t, "60s", a.device)
	if got := v.hold(t); got != "held <nil>" {
		t.Fatal(got)
	}
	stop(t, v.Process.Pid) // so that neither hears of the other's end
	stop(t, v.watchdog)
	unix.Kill(v.watchdog, unix.SIGKILL)
	if err := v.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	v.Wait() // it was killed
	a.wantFrozen(t, true)
	thawed, err := ThawLeft(dir + "/frozen")
	if err != nil || len(thawed) != 1 || thawed[0] != a.mount {
		t.Errorf("thawed %v, %v", thawed, err)
	}
	a.wantFrozen(t, false)
	// A session that ended well leaves nothing to thaw.
	s, err := Prepare(t.Context(), Options{Disks: []string{a.device}, Ledger: dir + "/frozen"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Hold(t.Context(), 5*time.Second); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir + "/frozen"); err != nil {
		t.Error(err)
	}
	if _, err := s.Release(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir + "/frozen"); err == nil {
		t.Error("the ledger is left")
	}
}

// TestAgentHangs: an agent that neither works nor dies.
func TestAgentHangs(t *testing.T) {
	t.Parallel()
	a := newLoopFS(t, memory(t), "ext4", 64<<20)
	v := newVictim(t, "500ms", a.device)
	if got := v.hold(t); got != "held <nil>" {
		t.Fatal(got)
	}
	stop(t, v.Process.Pid)
	a.wantFrozen(t, true)
	a.wantThawedWithin(t, 500*time.Millisecond+watchdogMargin+time.Second)
	if err := v.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if got := v.line(); !strings.HasPrefix(got, "over") {
		t.Error(got)
	}
	a.wantFrozen(t, false)
}

// TestWatchdogIsKilled: nothing stays frozen without a watchdog, and none gets frozen.
func TestWatchdogIsKilled(t *testing.T) {
	t.Parallel()
	a := newLoopFS(t, memory(t), "ext4", 64<<20)
	v := newVictim(t, "60s", a.device)
	if got := v.hold(t); got != "held <nil>" {
		t.Fatal(got)
	}
	a.wantFrozen(t, true)
	unix.Kill(v.watchdog, unix.SIGKILL) // the next lines tell
	if got := v.line(); !strings.Contains(got, "the watchdog died") {
		t.Error(got)
	}
	a.wantThawedWithin(t, time.Second)
	if got := v.line(); !strings.Contains(got, "the watchdog died") {
		t.Error(got)
	}
	w := newVictim(t, "60s", a.device)
	unix.Kill(w.watchdog, unix.SIGKILL) // the next lines tell
	if got := w.hold(t); got == "held <nil>" {
		t.Error("frozen without a watchdog")
	}
	a.wantFrozen(t, false)
	// One that lives and does not answer is as good as none.
	x := newVictim(t, "60s", a.device)
	stop(t, x.watchdog)
	if got := x.hold(t); !strings.Contains(got, "did not answer") {
		t.Error(got)
	}
	a.wantFrozen(t, false)
}

// TestWithoutWatchdog is the negative control: an agent that dies leaves the file
// system frozen if nobody watches.
func TestWithoutWatchdog(t *testing.T) {
	t.Parallel()
	a := newLoopFS(t, memory(t), "ext4", 64<<20)
	v := newVictim(t, "60s", a.device)
	if got := v.hold(t); got != "held <nil>" {
		t.Fatal(got)
	}
	stop(t, v.watchdog)
	if err := v.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	v.Wait() // it was killed
	time.Sleep(200 * time.Millisecond)
	a.wantFrozen(t, true)
	unix.Kill(v.watchdog, unix.SIGCONT) // the next line tells
	a.wantThawedWithin(t, 2*time.Second)
}
