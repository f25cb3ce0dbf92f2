package export

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"farside/internal/dr"
	"farside/internal/nbd"
	"farside/internal/nbd/nbdtest"
)

// ram is a Device without abilities; able adds them.
type ram struct {
	memFile
	err atomic.Pointer[error] // of Flush and WriteAt, if set
}

func newRAM(size int) *ram { return &ram{memFile: memFile{b: make([]byte, size)}} }

func (r *ram) Size() int64                             { return int64(len(r.b)) }
func (r *ram) ReadAt(p []byte, off int64) (int, error) { return copy(p, r.b[off:]), r.try("read", off) }

func (r *ram) Flush() error {
	if err := r.err.Load(); err != nil {
		return *err
	}
	return nil
}

func (r *ram) WriteAt(p []byte, off int64) (int, error) {
	if err := r.Flush(); err != nil {
		return 0, err
	}
	return r.memFile.WriteAt(p, off)
}

type able struct {
	*ram
	calls    []string
	readOnly bool
	err      error
}

func (a *able) Zero(_, _ int64) error       { a.calls = append(a.calls, "zero"); return a.err }
func (a *able) ZeroNoHole(_, _ int64) error { a.calls = append(a.calls, "no hole"); return a.err }
func (a *able) Trim(_, _ int64) error       { a.calls = append(a.calls, "trim"); return a.err }
func (a *able) Prefetch(_, _ int64) error   { a.calls = append(a.calls, "prefetch"); return a.err }
func (a *able) MultiConn() bool             { return true }
func (a *able) ReadOnly() bool              { return a.readOnly }
func (a *able) Map(off, n int64, fn func(off, n int64, zero, hole bool) error) error {
	return fn(off, n, true, true)
}

func listen(t *testing.T, o Options) *Server {
	t.Helper()
	s, err := Listen(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(context.Background()) })
	return s
}

func socket(t *testing.T) string { return filepath.Join(t.TempDir(), "made", "nbd.sock") }

func TestAddRemove(t *testing.T) {
	s := listen(t, Options{Socket: socket(t), Listed: true})
	d := newRAM(1 << 20)
	if err := s.Add("a", d, false); err != nil {
		t.Fatal(err)
	}
	if err := s.Add("a", d, false); !errors.Is(err, dr.ErrExists) {
		t.Errorf("twice: %v", err)
	}
	if err := s.Add("", d, false); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("no name: %v", err)
	}
	if err := s.Remove(t.Context(), "b"); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("remove what isn't: %v", err)
	}
	s.Add("r o", d, true)
	uri := s.URIs("a")
	if len(uri) != 1 {
		t.Fatal(uri)
	}
	names, err := nbd.List(t.Context(), uri[0], nil)
	if err != nil || len(names) != 2 || names[1] != "r o" {
		t.Errorf("list: %v, %v", names, err)
	}
	c, err := nbd.Dial(t.Context(), uri[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ro, err := nbd.Dial(t.Context(), s.URIs("r o")[0], nil)
	if err != nil || !ro.ReadOnly() || c.ReadOnly() || c.MinBlock() != dr.SectorSize {
		t.Fatalf("%v, %+v", err, ro)
	}
	defer ro.Close()
	if _, err := c.WriteAt(make([]byte, 4096), 512); err != nil {
		t.Error(err)
	}
	if err := s.Remove(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if c.Flush() == nil || ro.Flush() != nil {
		t.Error("not exactly the removed export's clients are cut off")
	}
	if _, err := nbd.Dial(t.Context(), uri[0], nil); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("dial: %v", err)
	}
	if err := s.Add("a", d, false); err != nil {
		t.Errorf("again: %v", err)
	}
	s.Close(t.Context())
	if err := s.Add("x", d, false); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("add after close: %v", err)
	}
}

// TestRemoveWaits: what is in flight is answered before Remove returns.
func TestRemoveWaits(t *testing.T) {
	s := listen(t, Options{Socket: socket(t)})
	entered, leave := make(chan struct{}), make(chan struct{})
	d := newRAM(1 << 20)
	d.fail = func(string, int64) error { entered <- struct{}{}; <-leave; return nil }
	s.Add("a", d, false)
	c, err := nbd.Dial(t.Context(), s.URIs("a")[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	answer := make(chan error)
	go func() { _, err := c.ReadAt(make([]byte, 512), 0); answer <- err }()
	<-entered
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := s.Remove(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("remove: %v", err)
	}
	close(leave)
	if err := <-answer; err != nil {
		t.Errorf("in flight: %v", err)
	}
}

func TestListenRefuses(t *testing.T) {
	path := socket(t)
	listen(t, Options{Socket: path})
	for name, test := range map[string]struct {
		o    Options
		want error
	}{
		"nowhere":     {Options{}, dr.ErrInvalid},
		"taken":       {Options{Socket: path}, dr.ErrExists},
		"no TLS":      {Options{Listen: "127.0.0.1:0"}, nil},
		"bad address": {Options{Listen: "nowhere", TLS: nbdtest.NewCerts(t).Server}, nil},
		"long path":   {Options{Socket: filepath.Join(t.TempDir(), string(make([]byte, 200)))}, nil},
	} {
		if s, err := Listen(test.o); err == nil || test.want != nil && !errors.Is(err, test.want) {
			t.Errorf("%s: %v, %v", name, s, err)
		}
	}
	// A socket that nobody listens on any more is replaced.
	stale := socket(t)
	if err := os.MkdirAll(filepath.Dir(stale), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	listen(t, Options{Socket: stale})
}

// TestJudges: an export over both ways, with the URIs that the Server gives.
func TestJudges(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a while")
	}
	certs := nbdtest.NewCerts(t)
	s := listen(t, Options{Socket: socket(t), Listen: "127.0.0.1:0", Host: "localhost", TLS: certs.Server, Listed: true, Log: func(err error) { t.Error(err) }})
	const size = 48 << 20
	for i, dir := range []string{"", certs.Dir} {
		if err := s.Add("a disk", &locked{ram: newRAM(size)}, false); err != nil {
			t.Fatal(err)
		}
		nbdtest.Judge(t, s.URIs("a disk")[i], size, nbdtest.Options{CertDir: dir, MinBlock: dr.SectorSize, Listed: true})
		if err := s.Remove(t.Context(), "a disk"); err != nil {
			t.Error(err)
		}
	}
}

// TestPlainTCP: in the clear where that is asked for, and the address says so.
func TestPlainTCP(t *testing.T) {
	s := listen(t, Options{Listen: "127.0.0.1:0", Plain: true, Log: func(err error) { t.Error(err) }})
	if err := s.Add("x", &locked{ram: newRAM(4096)}, false); err != nil {
		t.Fatal(err)
	}
	uri := s.URIs("x")[0]
	if !strings.HasPrefix(uri, "nbd://127.0.0.1:") {
		t.Errorf("address %s", uri)
	}
	c, err := nbd.Dial(t.Context(), uri, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want := bytes.Repeat([]byte("plain "), 86)[:512]
	got := make([]byte, 512)
	if _, err := c.WriteAt(want, 512); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ReadAt(got, 512); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %q, %v", got[:12], err)
	}
}

func TestDeviceAbilities(t *testing.T) {
	a := &able{ram: newRAM(1 << 20)}
	none := func(off, n int64, zero, hole bool) error {
		if zero || hole {
			return errors.New("holes")
		}
		return nil
	}
	p := device{newRAM(1 << 20)}
	if !errors.Is(p.Zero(0, 512), errors.ErrUnsupported) || !errors.Is(p.ZeroNoHole(0, 512), errors.ErrUnsupported) ||
		p.Trim(0, 512) != nil || p.Prefetch(0, 512) != nil || p.Map(0, 512, none) != nil || p.MultiConn() || p.ReadOnly() {
		t.Error("a device without abilities")
	}
	d := device{a}
	if errors.Join(d.Zero(0, 1), d.ZeroNoHole(0, 1), d.Trim(0, 1), d.Prefetch(0, 1)) != nil || len(a.calls) != 4 || !d.MultiConn() || d.ReadOnly() || d.Map(0, 1, none) == nil {
		t.Errorf("abilities: %v", a.calls)
	}
	a.err = dr.ErrUnsupported
	if !errors.Is(d.Zero(0, 1), errors.ErrUnsupported) || d.Trim(0, 1) != nil {
		t.Error("what is unsupported for now")
	}
	a.err = dr.ErrFull
	if !errors.Is(d.Trim(0, 1), nbd.ENOSPC) {
		t.Error("trim that fails")
	}
}

func TestErrorsOnTheWire(t *testing.T) {
	r := newRAM(1 << 20)
	s := listen(t, Options{Socket: socket(t)})
	s.Add("a", r, false)
	c, err := nbd.Dial(t.Context(), s.URIs("a")[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for kind, want := range map[error]nbd.Errno{
		dr.ErrFull: nbd.ENOSPC, dr.ErrDenied: nbd.EPERM, dr.ErrInvalid: nbd.EINVAL, dr.ErrUnavailable: nbd.ESHUTDOWN,
		dr.ErrCorrupt: nbd.EIO, dr.ErrUnsupported: nbd.ENOTSUP, context.Canceled: nbd.ESHUTDOWN,
	} {
		r.err.Store(&kind)
		_, werr := c.WriteAt(make([]byte, 512), 0)
		for _, err := range []error{werr, c.Flush()} {
			if !errors.Is(err, want) {
				t.Errorf("%v: client got %v", kind, err)
			}
		}
	}
}

// locked is a ram that many may use at once.
type locked struct {
	*ram
	mu sync.RWMutex
}

func (l *locked) ReadAt(p []byte, off int64) (int, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.ram.ReadAt(p, off)
}

func (l *locked) WriteAt(p []byte, off int64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ram.WriteAt(p, off)
}
