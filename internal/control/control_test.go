package control_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/control"
	"farside/internal/dr"
	"farside/internal/transport"
	"farside/internal/transport/transporttest"
)

func open(t *testing.T, dir string, now func() time.Time) *control.Client {
	t.Helper()
	c, err := control.Open(control.Options{DataDir: dir, Version: "v1", Now: now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// watch runs Watch and returns a channel of the names of what it gets.
func watch(t *testing.T, c *control.Client) <-chan string {
	t.Helper()
	names := make(chan string, 100)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		if err := c.Watch(ctx, func(a *farsidev1.Assignment) { names <- nameOf(a) }); err != nil {
			t.Errorf("watch ended with %v", err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	return names
}

func next(t *testing.T, names <-chan string, want string) {
	t.Helper()
	select {
	case got := <-names:
		if got != want {
			t.Fatalf("got assignment %q, want %q", got, want)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("assignment %q does not come", want)
	}
}

func eventually(t *testing.T, what string, fn func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !fn(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen", what)
		}
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	f := newFake(t, nil)
	dir := f.dir(f.addr)
	c := open(t, dir, nil)
	names := watch(t, c)
	f.set(f.work(7, "a"))
	next(t, names, "a")
	f.set(f.work(8, "b"))
	next(t, names, "b")
	// A catalog that was restored from a backup may have an older revision.
	f.set(f.work(3, "c"))
	next(t, names, "c")
	// Failures do not end it.
	f.failWith(unavailable())
	time.Sleep(100 * time.Millisecond)
	f.failWith(connect.NewError(connect.CodePermissionDenied, errors.New("no member")))
	time.Sleep(300 * time.Millisecond)
	f.set(f.work(4, "d"))
	f.failWith(nil)
	next(t, names, "d")
	// What is meant for another node is not taken over.
	foreign := f.work(5, "e")
	foreign.NodeId = dr.NewNodeID().String()
	f.set(foreign)
	time.Sleep(100 * time.Millisecond)
	f.set(f.work(6, "f"))
	next(t, names, "f")

	// A restart, with nobody there, goes on by what it knows.
	again := open(t, dir, nil)
	if nameOf(again.Assignment()) != "f" || again.Assignment().GetConfigServers()[0] != f.addr {
		t.Errorf("kept %v", again.Assignment())
	}
}

func TestWatchWithoutServer(t *testing.T) {
	t.Parallel()
	f := newFake(t, nil)
	dir := f.dir("127.0.0.1:1")
	kept := f.work(9, "kept")
	kept.ConfigServers = []string{"127.0.0.1:1"}
	if err := control.SaveAssignment(dir, kept); err != nil {
		t.Fatal(err)
	}
	names := watch(t, open(t, dir, nil))
	next(t, names, "kept")
	select {
	case got := <-names:
		t.Errorf("got %q from nobody", got)
	case <-time.After(200 * time.Millisecond):
	}
}

// TestServerList: the node follows the list in its assignment to where a server answers.
func TestServerList(t *testing.T) {
	t.Parallel()
	f := newFake(t, nil)
	dir := f.dir("127.0.0.1:1", f.addr)
	names := watch(t, open(t, dir, nil))
	second := f.listen("127.0.0.1:0")
	moved := f.work(1, "moved")
	moved.ConfigServers = []string{second, "127.0.0.1:1"}
	f.set(moved)
	next(t, names, "moved")
	f.failWith(unavailable()) // has it dial again
	time.Sleep(50 * time.Millisecond)
	f.failWith(nil)
	f.set(f.work(2, "there"))
	next(t, names, "there")
	if got := open(t, dir, nil).Assignment().GetConfigServers(); len(got) != 2 || got[0] != second {
		t.Errorf("kept servers %v", got)
	}
}

func TestReport(t *testing.T) {
	t.Parallel()
	f := newFake(t, nil)
	c := open(t, f.dir(f.addr), nil)
	if off := time.Since(c.ServerTime()).Abs(); off > time.Minute {
		t.Errorf("before any answer the clock is off by %v", off)
	}
	names := watch(t, c)
	f.set(f.work(5, "a"))
	next(t, names, "a")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	var skip sync.Mutex
	var silent bool
	go func() {
		ended <- c.Report(ctx, func() *farsidev1.Report {
			skip.Lock()
			defer skip.Unlock()
			if silent {
				return nil
			}
			return &farsidev1.Report{Addresses: []string{"a:1"}}
		}, time.Hour)
	}()
	eventually(t, "the first report", func() bool { n, _ := f.count(); return n == 1 })
	eventually(t, "the server's clock", func() bool { return c.ServerTime().Sub(time.Unix(0, fakeTime)).Abs() < time.Minute })
	r := f.lastReport()
	if r.GetVersion() != "v1" || r.GetAssignmentRevision() != 5 || r.GetHost().GetOs() == "" || r.GetStartedNs() == 0 || r.GetClockNs() == 0 || r.GetAddresses()[0] != "a:1" {
		t.Errorf("report %v", r)
	}
	c.ReportSoon()
	eventually(t, "the report that was asked for", func() bool { n, _ := f.count(); return n == 2 })
	skip.Lock()
	silent = true
	skip.Unlock()
	c.ReportSoon()
	time.Sleep(100 * time.Millisecond)
	if n, _ := f.count(); n != 2 {
		t.Errorf("%d reports, though there was nothing to report", n)
	}
	// The assignment sets the pace, also after a failure.
	skip.Lock()
	silent = false
	skip.Unlock()
	f.failWith(unavailable())
	fast := f.work(6, "b")
	fast.ReportEveryMs = 1
	f.set(fast)
	f.failWith(nil)
	next(t, names, "b")
	c.ReportSoon()
	eventually(t, "reports at the new pace", func() bool {
		n, _ := f.count()
		return n > 5 && f.lastReport().GetAssignmentRevision() == 6
	})
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("report ended with %v", err)
	}
}

// clock is a clock that tests move.
type clock struct {
	mu struct {
		sync.Mutex
		ahead time.Duration
	}
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.mu.ahead)
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.ahead += d
}

func TestRenewal(t *testing.T) {
	t.Parallel()
	clk := &clock{}
	f := newFake(t, clk.now)
	dir := f.dir(f.addr)
	c := open(t, dir, clk.now)
	names := watch(t, c)
	f.set(f.work(1, "a"))
	next(t, names, "a")
	first := c.Identity().Expires()
	day := 24 * time.Hour
	clk.advance(59 * day)
	time.Sleep(150 * time.Millisecond)
	if _, n := f.count(); n != 0 {
		t.Fatal("renewed before two thirds of its life")
	}
	f.failWith(unavailable())
	clk.advance(2 * day)
	time.Sleep(50 * time.Millisecond)
	f.failWith(nil) // a failed renewal is tried again
	eventually(t, "renewal", func() bool { return c.Identity().Expires().After(first) })
	if _, n := f.count(); n != 1 {
		t.Errorf("%d renewals", n)
	}
	// Later calls use the new certificate, and so does a restart.
	f.set(f.work(2, "b"))
	next(t, names, "b")
	eventually(t, "use of the new certificate", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.mu.peers[len(f.mu.peers)-1].Equal(c.Identity().Expires())
	})
	kept, err := transport.LoadIdentity(dir, clk.now)
	if err != nil || !kept.Expires().Equal(c.Identity().Expires()) {
		t.Errorf("kept certificate until %v, %v", kept.Expires(), err)
	}
	// The configuration server can ask for it at any time.
	clk.advance(time.Hour)
	ask := f.work(3, "c")
	ask.RenewIssuedBeforeNs = clk.now().UnixNano()
	clk.advance(time.Second)
	f.set(ask)
	next(t, names, "c")
	eventually(t, "renewal on demand", func() bool { _, n := f.count(); return n == 2 })
	time.Sleep(150 * time.Millisecond)
	if _, n := f.count(); n != 2 {
		t.Errorf("%d renewals on one demand", n)
	}
}

// TestNewAuthorities: a node takes over the authorities that its assignment names, and
// keeps the old ones if they make no sense.
func TestNewAuthorities(t *testing.T) {
	t.Parallel()
	f := newFake(t, nil)
	dir := f.dir(f.addr)
	c := open(t, dir, nil)
	names := watch(t, c)
	other := transporttest.NewSite(t, nil)
	both := f.work(1, "both")
	both.Authorities = append(f.site.CA.Authorities(), other.CA.Authorities()...)
	f.set(both)
	next(t, names, "both")
	if n := len(c.Identity().Authorities()); n != 2 {
		t.Errorf("trusts %d authorities", n)
	}
	bad := f.work(2, "bad")
	bad.Authorities = [][]byte{{1, 2, 3}}
	f.set(bad)
	next(t, names, "bad")
	f.set(f.work(3, "good"))
	next(t, names, "good")
	kept, err := transport.LoadIdentity(dir, nil)
	if err != nil || len(kept.Authorities()) != 1 {
		t.Errorf("kept %v, %v", kept, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	f := newFake(t, nil)
	if _, err := control.Open(control.Options{DataDir: t.TempDir()}); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("never joined: %v", err)
	}
	dir := f.dir(f.addr)
	name := filepath.Join(dir, "assignment.json")
	if err := os.WriteFile(name, []byte(`{"revision":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := control.Open(control.Options{DataDir: dir}); !errors.Is(err, dr.ErrCorrupt) {
		t.Errorf("broken assignment: %v", err)
	}
	// A newer program may have written what this one does not know.
	if err := os.WriteFile(name, []byte(`{"revision":"4","future":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if c := open(t, dir, nil); c.Assignment().GetRevision() != 4 {
		t.Errorf("read %v", c.Assignment())
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if _, err := control.Open(control.Options{DataDir: dir}); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("no assignment: %v", err)
	}
}

// TestForeignServer: a node does not talk to a server of another deployment, nor to another
// node that poses as one.
func TestForeignServer(t *testing.T) {
	t.Parallel()
	f, foreign := newFake(t, nil), newFake(t, nil)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	poser := f.site.Identity(transport.RoleMasterTarget).Serve(ln)
	defer poser.Close()
	for name, addr := range map[string]string{"foreign": foreign.addr, "poser": ln.Addr().String()} {
		c := open(t, f.dir(addr), nil)
		if err := c.Renew(t.Context()); !errors.Is(err, dr.ErrDenied) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := open(t, f.dir("127.0.0.1:1"), nil)
	if err := c.Renew(t.Context()); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("nobody: %v", err)
	}
}
