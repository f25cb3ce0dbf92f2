package e2e

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/demo/stage"
	"farside/internal/testenv"
)

// nobody is the user as whom Windows programs run: for root, \\.\PhysicalDrive0 would be the real disk.
const nobody = 65534

// wine runs Windows programs. Its prefix, and all that they write, belongs to nobody.
type wine struct {
	t   *testing.T
	dir string
}

const wineLoader = "/usr/lib/wine/wine64" // where Debian's package has it; there is no other in it

func newWine(t *testing.T, dir string) *wine {
	t.Helper()
	testenv.NeedRoot(t) // to become nobody
	testenv.NeedTool(t, wineLoader)
	w := &wine{t: t, dir: filepath.Join(dir, "wine")}
	if err := os.Mkdir(w.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(w.dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.server("-k").Run() }) // fails if nothing runs any more
	w.run("wineboot", "-i")
	if err := w.server("-w").Run(); err != nil { // it goes on in the background
		t.Fatal(err)
	}
	dll := filepath.Join(w.dir, "prefix", "drive_c", "windows", "system32", "bcryptprimitives.dll")
	if err := os.WriteFile(dll, prngDLL(), 0o644); err != nil {
		t.Fatal(err)
	}
	return w
}

// command is a Windows program as nobody. It dies with the test.
func (w *wine) command(args ...string) *exec.Cmd {
	return w.as(exec.Command(wineLoader, args...))
}

// run runs a Windows program to its end.
func (w *wine) run(args ...string) {
	w.t.Helper()
	log, err := os.CreateTemp(w.t.TempDir(), "") // a pipe would be held by the server, which goes on
	if err != nil {
		w.t.Fatal(err)
	}
	defer log.Close()
	cmd := w.command(args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Run(); err != nil {
		out, _ := os.ReadFile(log.Name())
		w.t.Fatalf("%s under wine: %v: %s", strings.Join(args, " "), err, out)
	}
}

// server is a command to the process that all programs of the prefix share.
func (w *wine) server(args ...string) *exec.Cmd {
	return w.as(exec.Command(filepath.Join(filepath.Dir(wineLoader), "wineserver64"), args...))
}

func (w *wine) as(cmd *exec.Cmd) *exec.Cmd {
	cmd.Dir = w.dir
	cmd.Env = []string{
		"PATH=/usr/bin:/bin", "HOME=" + w.dir, "WINEPREFIX=" + filepath.Join(w.dir, "prefix"), "WINEDEBUG=-all",
		"WINEDLLOVERRIDES=mscoree,mshtml,winemenubuilder.exe=", // nothing is to be fetched or installed
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// windowsPath is what programs see a file as.
func windowsPath(path string) string { return `Z:` + strings.ReplaceAll(path, "/", `\`) }

// windowsProgram builds the program for Windows.
func windowsProgram(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "farside.exe")
	cmd := exec.Command("go", "build", "-o", path, "../../cmd/farside")
	cmd.Env = append(os.Environ(), "GOOS=windows", "GOARCH=amd64", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build for windows: %v: %s", err, out)
	}
	return path
}

// TestWindowsAgent: the agent for windows/amd64, under Wine, joins real roles and replicates a file by scanning.
// A second scan sends only what changed.
func TestWindowsAgent(t *testing.T) {
	if testing.Short() {
		t.Skip("runs whole processes: not with -short")
	}
	t.Parallel()
	const size = 12<<20 + 512
	f := &far{t: t, dir: workDir(t), size: size}
	w := newWine(t, f.dir)
	disk := filepath.Join(w.dir, "disk.img")
	content := make([]byte, size)
	rng := rand.New(rand.NewPCG(3, 4))
	for i := range content[:4<<20] {
		content[i] = byte(rng.Uint32())
	}
	if err := os.WriteFile(disk, content, 0o644); err != nil {
		t.Fatal(err)
	}
	exe := windowsProgram(t, f.dir)
	var err error
	if f.stage, err = stage.Raise(t.Context(), stage.Options{Dir: f.dir, Program: program(t), Driver: "scan", Elsewhere: true}); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(w.dir, "agent.log")
	t.Cleanup(func() {
		if err := f.stage.Strike(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(stage.LastLines(log, 20))
		}
	})
	w.join(f, exe, disk)
	agent, err := stage.Start("agent under wine", log, w.command(exe, "agent", "--config", windowsPath(filepath.Join(w.dir, "agent.yaml"))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = agent.Kill() }) // may have ended
	if err := f.stage.Wait(t.Context(), 30*time.Second); err != nil {
		t.Fatal(err)
	}
	f.scanned(windowsPath(disk), disk, content)
}

// join joins the agent and configures it.
func (w *wine) join(f *far, exe, disk string) {
	w.t.Helper()
	token, err := f.stage.Far.Client.CreateToken(w.t.Context(), &farsidev1.CreateTokenRequest{Role: farsidev1.Role_ROLE_AGENT, Name: "windows"})
	if err != nil {
		w.t.Fatal(err)
	}
	data := windowsPath(filepath.Join(w.dir, "data"))
	w.run(exe, "join", "--data", data, token.GetToken())
	conf := fmt.Sprintf("data: '%s'\ncapture: {scan: {every: 1s, tables: '%s'}}\ndisks: ['%s']\n",
		data, windowsPath(filepath.Join(w.dir, "tables")), windowsPath(disk))
	if err := os.WriteFile(filepath.Join(w.dir, "agent.yaml"), []byte(conf), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

// scanned protects the disk that the agent knows as path, and follows two scans of it.
func (f *far) scanned(path, file string, content []byte) {
	t := f.t
	t.Helper()
	x := &f.stage.Far
	if err := x.Offered(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if err := x.Protect(t.Context(), path, ""); err != nil {
		t.Fatal(err)
	}
	first := f.pointSince(time.Time{})
	copied := f.received()
	if !bytes.Equal(f.read(first.GetNewest().GetPosition()), content) {
		t.Error("the first point differs from the file")
	}
	copy(content[9<<20:], "changed")
	changed := time.Now()
	if err := os.WriteFile(file, content, 0o644); err != nil {
		t.Fatal(err)
	}
	second := f.pointSince(changed)
	if !bytes.Equal(f.read(second.GetNewest().GetPosition()), content) {
		t.Error("the second point differs from the file")
	}
	sent := f.received() - copied
	if sent <= 0 || sent > 128<<10 || copied < 4<<20 {
		t.Errorf("%d bytes came for the first copy, %d for a change within one block", copied, sent)
	}
	t.Logf("%d bytes of frames for the first copy, %d for the change", copied, sent)
}

// received returns how many bytes of frames the master target holds.
func (f *far) received() (n int64) {
	f.t.Helper()
	names, err := filepath.Glob(filepath.Join(f.dir, "master-target", "vaults", "*", "log", "*.seg"))
	if err != nil || len(names) == 0 {
		f.t.Fatalf("no segments: %v", err)
	}
	for _, name := range names {
		info, err := os.Stat(name)
		if err != nil {
			f.t.Fatal(err)
		}
		n += info.Size()
	}
	return n
}

// pointSince waits for a recovery point behind a moment.
func (f *far) pointSince(moment time.Time) (m *farsidev1.Machine) {
	f.t.Helper()
	err := stage.Poll(f.t.Context(), 30*time.Second, "wait for a recovery point", func(ctx context.Context) (ok bool, err error) {
		m, err = f.stage.Far.State(ctx)
		return m.GetNewest() != nil && m.GetNewest().GetTimeNs() > moment.UnixNano(), err
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return m
}
