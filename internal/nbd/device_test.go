package nbd

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// testDevice is memory that counts what is done to it and fails on demand.
// Zeroed and trimmed 64 KiB units are holes in its map.
type testDevice struct {
	mu      sync.Mutex
	data    []byte
	hole    []bool
	flushes atomic.Int64
	fetched atomic.Int64
	fail    func(op string, off, n int64) error
	multi   bool
	ro      bool
}

const unit = 64 << 10

func newTestDevice(size int) *testDevice {
	d := &testDevice{data: make([]byte, size), hole: make([]bool, (size+unit-1)/unit)}
	for i := range d.hole {
		d.hole[i] = true
	}
	return d
}

func (d *testDevice) try(op string, off, n int64) error {
	if d.fail == nil {
		return nil
	}
	return d.fail(op, off, n)
}

func (d *testDevice) ReadAt(p []byte, off int64) (int, error) {
	if err := d.try("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(p, d.data[off:]), nil
}

func (d *testDevice) WriteAt(p []byte, off int64) (int, error) {
	if err := d.try("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for u := off / unit; u*unit < off+int64(len(p)); u++ {
		d.hole[u] = false
	}
	return copy(d.data[off:], p), nil
}

func (d *testDevice) Size() int64     { return int64(len(d.data)) }
func (d *testDevice) MultiConn() bool { return d.multi }
func (d *testDevice) ReadOnly() bool  { return d.ro }
func (d *testDevice) Flush() error    { d.flushes.Add(1); return d.try("flush", 0, 0) }

func (d *testDevice) punch(op string, off, n int64) error {
	if err := d.try(op, off, n); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off : off+n])
	for u := (off + unit - 1) / unit; (u+1)*unit <= off+n; u++ {
		d.hole[u] = true
	}
	return nil
}

func (d *testDevice) Zero(off, n int64) error { return d.punch("zero", off, n) }
func (d *testDevice) Trim(off, n int64) error { return d.punch("trim", off, n) }

func (d *testDevice) Prefetch(_, n int64) error { d.fetched.Add(n); return nil }

func (d *testDevice) Map(off, n int64, fn func(off, n int64, zero, hole bool) error) error {
	if err := d.try("map", off, n); err != nil {
		return err
	}
	for end := off + n; off < end; {
		next := min((off/unit+1)*unit, int64(len(d.data)))
		d.mu.Lock()
		hole := d.hole[off/unit]
		d.mu.Unlock()
		if err := fn(off, next-off, hole, hole); err != nil {
			return err
		}
		off = next
	}
	return nil
}

// plain hides every optional ability of a device.
type plain struct{ d *testDevice }

func (p plain) ReadAt(b []byte, off int64) (int, error)  { return p.d.ReadAt(b, off) }
func (p plain) WriteAt(b []byte, off int64) (int, error) { return p.d.WriteAt(b, off) }
func (p plain) Size() int64                              { return p.d.Size() }
func (p plain) Flush() error                             { return p.d.Flush() }

// testServer is a server of one or more exports on a Unix socket.
type testServer struct {
	*Server
	uri  func(name string) string
	path string
	logs struct {
		sync.Mutex
		errs []error
	}
}

func (s *testServer) logged() []error {
	s.logs.Lock()
	defer s.logs.Unlock()
	return s.logs.errs
}

// waitLog waits until the server reported an error.
func (s *testServer) waitLog(t *testing.T) error {
	t.Helper()
	for range 500 {
		if l := s.logged(); len(l) > 0 {
			return l[0]
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("no error was logged")
	return nil
}

func serve(t testing.TB, conf Config, exports map[string]*Export) *testServer {
	t.Helper()
	s := &testServer{path: filepath.Join(t.TempDir(), "s")}
	if conf.Lookup == nil {
		conf.Lookup = func(name string) (*Export, error) {
			if e := exports[name]; e != nil {
				return e, nil
			}
			return nil, ErrUnknownExport
		}
	}
	conf.Log = func(err error) {
		s.logs.Lock()
		defer s.logs.Unlock()
		s.logs.errs = append(s.logs.errs, err)
	}
	var err error
	if s.Server, err = NewServer(conf); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	s.uri = func(name string) string {
		return URI{Network: "unix", Address: s.path, Name: name, TLS: conf.Mode == TLSRequired}.String()
	}
	t.Cleanup(func() {
		s.Close()
		if err := <-done; !errors.Is(err, ErrServerClosed) {
			t.Errorf("Serve: %v", err)
		}
	})
	return s
}

// connect dials the default export of s.
func connect(t testing.TB, s *testServer, name string) *Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := Dial(ctx, s.uri(name), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
