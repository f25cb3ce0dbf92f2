package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"farside/internal/demo"
	"farside/internal/testenv"
)

// program builds farside once and returns its path.
func program(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("runs whole processes: not with -short")
	}
	dir, err := os.MkdirTemp("", "farside-e2e-") // not t.TempDir: others than root must reach it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "farside")
	cmd := exec.Command("go", "build", "-o", path, "../../cmd/farside")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build farside: %v: %s", err, out)
	}
	return path
}

// demoCommand is `farside demo` in a work directory of the test's, small and quick.
func demoCommand(ctx context.Context, program, work string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program, append([]string{
		"demo", "--once", "--json", "--work-dir", work, "--disk-size", "128MiB", "--duration", "3s", "--rate", "100",
	}, args...)...)
	cmd.Dir = "../.." // where make demo runs, and finds the guest's kernel
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	return cmd
}

// workDir is a directory that every user may use.
func workDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "farside-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

// finish runs the demo to its end and returns the object that it printed last.
func finish(t *testing.T, cmd *exec.Cmd) demo.Result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	start := time.Now()
	err := cmd.Run()
	t.Logf("took %.1f s", time.Since(start).Seconds())
	if err != nil {
		t.Fatalf("demo: %v\n%s\n%s", err, errs.String(), out.String())
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	var r demo.Result
	dec := json.NewDecoder(strings.NewReader(lines[len(lines)-1]))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		t.Fatalf("the last line is not the result: %v\n%s", err, out.String())
	}
	t.Logf("%s", lines[len(lines)-1])
	return r
}

// left lists what a demo in the work directory left behind: processes, mounts, loop devices, files. It waits a moment
// for what the kernel takes down by itself.
func left(t *testing.T, work string, wantFiles bool) {
	t.Helper()
	var found []string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		found = append(processesOf(t, work), append(mountsOf(t, work), loopsOf(t, work)...)...)
		if !wantFiles {
			entries, err := os.ReadDir(work)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				found = append(found, "file "+e.Name())
			}
		}
		if len(found) == 0 {
			return
		}
	}
	t.Errorf("left behind: %q", found)
}

func processesOf(t *testing.T, work string) (found []string) {
	t.Helper()
	list, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range list {
		line, err := os.ReadFile(file)
		if err == nil && bytes.Contains(line, []byte(work)) {
			found = append(found, fmt.Sprintf("%s %q", filepath.Dir(file), line))
		}
	}
	return found
}

func mountsOf(t *testing.T, work string) (found []string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, work) {
			found = append(found, "mount "+line)
		}
	}
	return found
}

func loopsOf(t *testing.T, work string) (found []string) {
	t.Helper()
	list, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range list {
		name, err := os.ReadFile(file)
		if err == nil && strings.Contains(string(name), work) {
			found = append(found, file)
		}
	}
	return found
}

// programs returns the ids of all BPF programs in the kernel.
func programs(t *testing.T) (ids []ebpf.ProgramID) {
	t.Helper()
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return ids
		}
		if err != nil {
			t.Fatal(err)
		}
		ids, id = append(ids, next), next
	}
}

func TestDemo(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedLoop(t)
	testenv.NeedEBPF(t)
	testenv.NeedTool(t, "mkfs.ext4", "e2fsck", "qemu-system-x86_64")
	work := workDir(t)
	before := programs(t)
	r := finish(t, demoCommand(t.Context(), program(t), work, "--capture", "ebpf"))
	if err := r.Bad(); err != nil {
		t.Error(err)
	}
	if r.Capture != "ebpf" || r.Fsck != "clean" || r.Committed < 100 || r.Writes < 100 || r.Bytes < 1<<20 || r.RTO <= r.ViewOpen {
		t.Errorf("got %+v", r)
	}
	if r.Recovered < r.Committed {
		t.Errorf("%d of %d commits recovered, though everything had time to arrive", r.Recovered, r.Committed)
	}
	if os.Getenv("FARSIDE_REQUIRE") == "all" && !r.Boot.Marker {
		t.Errorf("no guest read the replica: %+v", r.Boot)
	}
	left(t, work, false)
	for _, id := range programs(t) {
		if !slices.Contains(before, id) {
			p, err := ebpf.NewProgramFromID(id)
			if err != nil {
				continue // gone meanwhile
			}
			t.Logf("BPF program %v is new; another test may run one", p)
			p.Close()
		}
	}
}

// TestDemoWithoutRights runs as a user who is not root, in front of a tap.
func TestDemoWithoutRights(t *testing.T) {
	work := workDir(t)
	cmd := demoCommand(t.Context(), program(t), work)
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	cmd.Env = append(os.Environ(), "HOME="+work)
	r := finish(t, cmd)
	if err := r.Bad(); err != nil {
		t.Error(err)
	}
	if r.Capture != "tap" || r.Fsck != "skipped" || r.Committed < 100 || r.Recovered < r.Committed {
		t.Errorf("got %+v", r)
	}
	left(t, work, false)
}

// TestDemoInterrupted ends the demo at each of its steps, politely and not.
func TestDemoInterrupted(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedLoop(t)
	testenv.NeedEBPF(t)
	testenv.NeedTool(t, "mkfs.ext4", "e2fsck")
	p := program(t)
	for _, tc := range []struct {
		name, step string
		signal     syscall.Signal
	}{
		{"interrupt while roles start", "2. ", syscall.SIGINT},
		{"interrupt while replicating", "4. ", syscall.SIGINT},
		{"terminate in the disaster", "6. ", syscall.SIGTERM},
		{"interrupt in the recovery", "7. ", syscall.SIGINT},
		{"kill while replicating", "4. ", syscall.SIGKILL},
		{"kill while comparing", "5. ", syscall.SIGKILL},
	} {
		t.Run(tc.name, func(t *testing.T) {
			work := workDir(t)
			cmd := demoCommand(t.Context(), p, work, "--no-boot")
			errs, err := cmd.StderrPipe() // with --json the steps go there
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var said strings.Builder
			signalled := false
			for sc := bufio.NewScanner(errs); sc.Scan(); {
				fmt.Fprintln(&said, sc.Text())
				if strings.HasPrefix(sc.Text(), tc.step) && !signalled {
					signalled = true
					if err := cmd.Process.Signal(tc.signal); err != nil {
						t.Fatal(err)
					}
				}
			}
			err = cmd.Wait()
			if !signalled {
				t.Fatalf("it never came to step %s: %v\n%s", tc.step, err, said.String())
			}
			var exit *exec.ExitError
			if !errors.As(err, &exit) || tc.signal != syscall.SIGKILL && exit.ExitCode() != 130 {
				t.Errorf("ended with %v\n%s", err, said.String())
			}
			left(t, work, tc.signal == syscall.SIGKILL)
		})
	}
}
