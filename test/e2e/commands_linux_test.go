package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"farside/internal/nbd"
)

// site is a directory with all roles, driven by the command line alone, as in docs/getting-started.md; the agent taps a file,
// so it needs no rights.
type site struct {
	t         *testing.T
	program   string
	dir       string
	processes map[string]*exec.Cmd
}

func newSite(t *testing.T) *site {
	s := &site{t: t, program: program(t), dir: workDir(t), processes: map[string]*exec.Cmd{}}
	t.Cleanup(func() {
		for role := range s.processes {
			s.stop(role)
		}
		if t.Failed() {
			logs, _ := filepath.Glob(s.path("*.log"))
			for _, log := range logs {
				b, _ := os.ReadFile(log)
				t.Logf("%s:\n%s", filepath.Base(log), b)
			}
		}
	})
	return s
}

func (s *site) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// try runs a command line and returns output, errors and exit code.
func (s *site) try(args ...string) (out, errs string, code int) {
	s.t.Helper()
	var o, e bytes.Buffer
	cmd := exec.CommandContext(s.t.Context(), s.program, args...)
	cmd.Env = append(os.Environ(), "FARSIDE_CONTEXT="+s.path("config-server", "admin.json"))
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// do runs a command line that must work.
func (s *site) do(args ...string) string {
	s.t.Helper()
	out, errs, code := s.try(args...)
	if code != 0 {
		s.t.Fatalf("farside %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, errs)
	}
	return strings.TrimSpace(out)
}

// refused runs a command line that must fail with the code and a text.
func (s *site) refused(code int, text string, args ...string) {
	s.t.Helper()
	out, errs, got := s.try(args...)
	if got != code || !strings.Contains(errs, text) || !strings.HasPrefix(errs, "farside: ") {
		s.t.Errorf("farside %s: exit code %d, want %d and %q\n%s%s", strings.Join(args, " "), got, code, text, out, errs)
	}
}

// answer runs a command line with --json and decodes the answer.
func answer[T any](s *site, args ...string) (v T) {
	s.t.Helper()
	if err := json.Unmarshal([]byte(s.do(append(args, "--json")...)), &v); err != nil {
		s.t.Fatalf("farside %s: %v", strings.Join(args, " "), err)
	}
	return v
}

// start starts a role with a configuration in which DIR is its data directory.
func (s *site) start(role, config string) {
	s.t.Helper()
	file := s.path(role + ".yaml")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(config, "DIR", s.path(role))), 0o600); err != nil {
		s.t.Fatal(err)
	}
	log, err := os.OpenFile(s.path(role+".log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(s.program, role, "--config", file)
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.processes[role] = cmd
}

// stop ends a role politely; it must not mind.
func (s *site) stop(role string) {
	cmd := s.processes[role]
	delete(s.processes, role)
	if err := errors.Join(cmd.Process.Signal(syscall.SIGTERM), cmd.Wait()); err != nil {
		s.t.Errorf("stop %s: %v", role, err)
	}
}

// eventually waits until a condition holds.
func (s *site) eventually(what string, holds func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !holds(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("%s: not within 30 s", what)
		}
	}
}

// raise makes the site of the getting-started guide.
func (s *site) raise(disk string) {
	s.start("config-server", "data: DIR\nlisten: 127.0.0.1:"+freePort(s.t)+"\nreport_every: 100ms\n")
	s.eventually("the configuration server answers", func() bool { _, _, code := s.try("node", "list"); return code == 0 })
	for role, name := range map[string]string{"process-server": "ps", "master-target": "mt", "agent": "web"} {
		s.do("join", "--data", s.path(role), s.do("token", "create", role, "--name", name))
	}
	s.start("process-server", "data: DIR\nlisten: 127.0.0.1:0\n")
	s.start("master-target", "data: DIR\nlisten: 127.0.0.1:0\nnbd: {listen: '127.0.0.1:0'}\n")
	s.start("agent", fmt.Sprintf("data: DIR\ncapture:\n  driver: tap\n  tap:\n    socket: %s\n    disks: [{name: data, path: %s}]\n", s.path("tap.sock"), disk))
	s.eventually("all nodes are online", func() bool {
		online := 0
		for _, n := range answer[[]struct{ Online bool }](s, "node", "list") {
			if n.Online {
				online++
			}
		}
		return online == 3
	})
}

// freePort returns a port of the loopback that is free now.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
}

// write writes a pattern through the tap and makes it durable.
func (s *site) write(pattern string, off int64) {
	s.t.Helper()
	c, err := nbd.Dial(s.t.Context(), "nbd+unix:///data?socket="+s.path("tap.sock"), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.WriteAt(sector(pattern), off); err != nil {
		s.t.Fatal(err)
	}
	if err := c.Flush(); err != nil {
		s.t.Fatal(err)
	}
}

func sector(pattern string) []byte {
	return bytes.Repeat([]byte(pattern), 512)[:512]
}

// view is what the test needs of `view open --json`.
type view struct {
	ID      string
	Exports []struct {
		Size int64
		URIs []string
	}
}

// TestCommands goes the way of the getting-started guide, with the mistakes that people make on it.
func TestCommands(t *testing.T) {
	s := newSite(t)
	const size = 64 << 20
	disk := s.path("disk.img")
	if err := os.WriteFile(disk, append(sector("old "), make([]byte, size-512)...), 0o600); err != nil {
		t.Fatal(err)
	}
	s.raise(disk)
	s.refuse()

	s.do("machine", "protect", "web", "--disk", disk)
	s.eventually("web is protected", func() bool {
		return answer[struct{ State string }](s, "machine", "show", "web").State == "protected"
	})
	s.write("first ", 4096)
	tag := answer[struct {
		Position struct{ Timeline, Seq uint64 }
	}](s, "point", "tag", "web", "after first")
	s.write("second ", 4096)
	s.do("point", "tag", "web", "after second")
	if out := s.do("point", "list", "web"); !strings.Contains(out, `tag "after first"`) || !strings.Contains(out, "yes") {
		t.Errorf("points:\n%s", out)
	}

	s.garbage()
	first := fmt.Sprintf("%d:%d", tag.Position.Timeline, tag.Position.Seq)
	s.export("tag:after first", map[int64]string{0: "old ", 4096: "first "})
	s.export(first, map[int64]string{0: "old ", 4096: "first "})
	s.export("latest", map[int64]string{0: "old ", 4096: "second "})
	s.use(first)
	s.after()
}

// refuse tries what must not work; nothing of it may do harm.
func (s *site) refuse() {
	used := s.do("token", "create", "agent", "--name", "used")
	s.do("join", "--data", s.path("used"), used)
	s.refused(4, "token", "join", "--data", s.path("again"), used)
	s.refused(7, "identity", "join", "--data", s.path("agent"), s.do("token", "create", "agent"))
	s.refused(2, "altered", "join", "--data", s.path("again"), used[:len(used)-2])
	s.refused(2, "not for a master-target", "join", "--role", "master-target", "--data", s.path("again"), s.do("token", "create", "agent"))
	s.refused(3, "nobody", "machine", "show", "nobody")
	s.refused(3, "", "view", "open", "web")
	if _, errs, code := s.try("machine", "protect", "web", "--disk", "/dev/nonsense"); code == 0 || errs == "" {
		s.t.Errorf("an unknown disk: exit code %d, %q", code, errs)
	}
	file := s.path("bad.yaml")
	for role := range s.processes {
		if err := os.WriteFile(file, []byte("no_such_key: 1\n"), 0o600); err != nil {
			s.t.Fatal(err)
		}
		s.refused(2, "no_such_key", role, "--config", file)
		s.refused(3, "no such file", role, "--config", s.path("missing.yaml"))
	}
}

// garbage talks nonsense on every port of every role, by TCP and by the Unix sockets; all of them go on. What the test does
// next proves that nothing was lost by it.
func (s *site) garbage() {
	var doors []string
	for _, n := range answer[[]struct{ Addresses []string }](s, "node", "list") {
		for _, a := range n.Addresses {
			doors = append(doors, "tcp "+a)
		}
	}
	b, err := os.ReadFile(s.path("config-server.yaml"))
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if a, ok := strings.CutPrefix(strings.TrimSpace(line), "listen: "); ok {
			doors = append(doors, "tcp "+a)
		}
	}
	v := answer[view](s, "view", "open", "web")
	for _, uri := range v.Exports[0].URIs {
		if u, err := url.Parse(uri); err == nil && u.Host != "" {
			doors = append(doors, "tcp "+u.Host)
		}
	}
	doors = append(doors, "unix "+s.path("master-target", "nbd.sock"), "unix "+s.path("tap.sock"))
	if len(doors) < 6 {
		s.t.Fatalf("only %q", doors)
	}
	random := make([]byte, 100_000)
	rand.NewChaCha8([32]byte{7}).Read(random)
	for _, door := range doors {
		for _, bytes := range [][]byte{random, []byte("GET / HTTP/1.0\r\n\r\n"), {0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc}, {}} {
			network, addr, _ := strings.Cut(door, " ")
			c, err := net.Dial(network, addr)
			if err != nil {
				s.t.Errorf("%s: %v", door, err)
				continue
			}
			_, _ = c.Write(bytes) // it may hang up in the middle
			c.Close()
		}
	}
	s.do("view", "close", v.ID)
	for role, cmd := range s.processes {
		if err := cmd.Process.Signal(syscall.Signal(0)); err != nil {
			s.t.Errorf("%s ended: %v", role, err)
		}
	}
}

// export exports a point and compares sectors.
func (s *site) export(at string, want map[int64]string) {
	s.t.Helper()
	image := s.path("image.raw")
	s.do("export", "web", image, "--at", at)
	b, err := os.ReadFile(image)
	if err != nil {
		s.t.Fatal(err)
	}
	for off, pattern := range want {
		if !bytes.Equal(b[off:off+512], sector(pattern)) {
			s.t.Errorf("export at %s: at %d lies %q, want %q", at, off, b[off:off+16], pattern)
		}
	}
	if err := os.Remove(image); err != nil {
		s.t.Fatal(err)
	}
}

// use opens a writable view, writes to it, and sees that nothing else changed.
func (s *site) use(at string) {
	v := answer[view](s, "view", "open", "web", "--at", at, "--writable")
	uri := v.Exports[0].URIs[len(v.Exports[0].URIs)-1]
	for _, u := range v.Exports[0].URIs {
		if strings.HasPrefix(u, "nbd+unix") {
			uri = u
		}
	}
	c, err := nbd.Dial(s.t.Context(), uri, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := c.WriteAt(sector("branch "), 8192); err != nil {
		s.t.Error(err)
	}
	b := make([]byte, 512)
	for off, want := range map[int64]string{0: "old ", 4096: "first ", 8192: "branch "} {
		if _, err := c.ReadAt(b, off); err != nil || !bytes.Equal(b, sector(want)) {
			s.t.Errorf("view at %d: %q, %v", off, b[:16], err)
		}
	}
	if err := c.Close(); err != nil {
		s.t.Error(err)
	}
	s.do("view", "close", v.ID)
	s.refused(3, "", "view", "close", "00000000-0000-4000-8000-000000000000")
	// Without the socket, as from another machine, it goes over TLS.
	if err := os.Remove(s.path("master-target", "nbd.sock")); err != nil {
		s.t.Fatal(err)
	}
	s.export(at, map[int64]string{4096: "first ", 8192: "\x00"})
}

// after takes the master target down and looks at its files.
func (s *site) after() {
	s.stop("master-target")
	out := s.do("check", s.path("master-target"))
	if !strings.Contains(out, "whole") {
		s.t.Errorf("check: %s", out)
	}
	segments, err := filepath.Glob(s.path("master-target", "vaults", "*", "log", "*.seg"))
	if err != nil || len(segments) == 0 {
		s.t.Fatalf("no segments, %v", err)
	}
	if out := s.do("inspect", segments[0]); !strings.Contains(out, "segment") {
		s.t.Errorf("inspect: %s", out)
	}
	b, err := os.ReadFile(segments[0])
	if err != nil {
		s.t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(segments[0], b, 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.refused(5, "findings", "check", s.path("master-target"))
}
