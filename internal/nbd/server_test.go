package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"farside/internal/nbd/nbdtest"
)

func TestNewServerRefuses(t *testing.T) {
	lookup := func(string) (*Export, error) { return nil, ErrUnknownExport }
	for _, c := range []Config{{}, {Lookup: lookup, Mode: TLSAllowed}, {Lookup: lookup, Mode: TLSRequired}} {
		if _, err := NewServer(c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}

func TestTLS(t *testing.T) {
	certs := nbdtest.NewCerts(t)
	d := newTestDevice(4 << 20)
	exports := map[string]*Export{"x": {Device: d}}
	for _, mode := range []TLSMode{TLSAllowed, TLSRequired} {
		s := serve(t, Config{TLS: certs.Server, Mode: mode, List: func() []string { return []string{"x"} }}, exports)
		secure := URI{Network: "unix", Address: s.path, Name: "x", TLS: true}.String()
		open := URI{Network: "unix", Address: s.path, Name: "x"}.String()
		c, err := Dial(t.Context(), secure, certs.Client)
		if err != nil {
			t.Fatal(err)
		}
		want, got := noise(1, 3<<20), make([]byte, 3<<20)
		if _, err := c.WriteAt(want, 99); err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadAt(got, 99); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("through TLS: %v", err)
		}
		c.Close()
		if names, err := List(t.Context(), secure, certs.Client); err != nil || len(names) != 1 {
			t.Errorf("list: %v, %v", names, err)
		}
		c, err = Dial(t.Context(), open, nil)
		if mode == TLSRequired {
			if err == nil || !strings.Contains(err.Error(), "TLS is required") {
				t.Errorf("in the clear: %v", err)
			}
			if _, err := List(t.Context(), open, nil); err == nil {
				t.Error("listed in the clear")
			}
		} else if err != nil {
			t.Errorf("in the clear: %v", err)
		} else {
			c.Close()
		}
		if _, err := Dial(t.Context(), secure, nil); err == nil {
			t.Error("TLS without a configuration")
		}
		stranger := nbdtest.NewCerts(t)
		if _, err := Dial(t.Context(), secure, stranger.Client); err == nil {
			t.Error("trusted an unknown server")
		}
		both := stranger.Client.Clone()
		both.RootCAs = certs.Client.RootCAs
		if c, err := Dial(t.Context(), secure, both); err == nil {
			t.Error("a stranger was let in")
			c.Close()
		}
	}
}

func TestTLSOverTCP(t *testing.T) {
	certs := nbdtest.NewCerts(t)
	s := serve(t, Config{TLS: certs.Server, Mode: TLSRequired}, map[string]*Export{"x": {Device: newTestDevice(1 << 20)}})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- s.Serve(l) }()
	c, err := Dial(t.Context(), "nbds://"+l.Addr().String()+"/x", certs.Client)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteAt(make([]byte, 1<<20), 0); err != nil {
		t.Error(err)
	}
	c.Close()
	s.Close()
	if err := <-done; !errors.Is(err, ErrServerClosed) {
		t.Error(err)
	}
	if err := s.Serve(l); !errors.Is(err, ErrServerClosed) {
		t.Errorf("serve after close: %v", err)
	}
	if err := s.ServeConn(nopConn{}); !errors.Is(err, ErrServerClosed) {
		t.Errorf("serve a connection after close: %v", err)
	}
}

type nopConn struct{ net.Conn }

func (nopConn) Close() error { return nil }

// TestTLSOptions: what is wrong around STARTTLS.
func TestTLSOptions(t *testing.T) {
	certs := nbdtest.NewCerts(t)
	s := serve(t, Config{TLS: certs.Server, Mode: TLSRequired}, map[string]*Export{"": {Device: newTestDevice(1 << 20)}})
	r := dialRaw(t, s)
	r.greet(3)
	for _, opt := range []uint32{optList, optInfo, optGo, optStructuredReply, optSetMeta, optListMeta, 77} {
		r.expect([]uint32{repErrTLSReqd}, opt)
	}
	r.expect([]uint32{repErrInvalid}, optStartTLS, "data")
	r.expect([]uint32{repAck}, optStartTLS)
	inner := &raw{t, tls.Client(r.Conn, &tls.Config{
		RootCAs: certs.Client.RootCAs, Certificates: certs.Client.Certificates, ServerName: "localhost",
	})}
	inner.expect([]uint32{repErrInvalid}, optStartTLS)
	inner.expect([]uint32{repInfo, repInfo, repAck}, optGo, uint32(0), uint16(0))
	if l := s.logged(); len(l) != 0 {
		t.Errorf("logged %v", l)
	}
	for name, do := range map[string]func(r *raw){
		"export name in the clear": func(r *raw) { r.option(optExportName) },
		"injected":                 func(r *raw) { r.send(uint64(magicOption), uint32(optStartTLS), uint32(0), "more") },
		"no TLS behind":            func(r *raw) { r.expect([]uint32{repAck}, optStartTLS); r.send("no hello\r\n") },
	} {
		s := serve(t, Config{TLS: certs.Server, Mode: TLSRequired}, nil)
		r := dialRaw(t, s)
		r.greet(3)
		do(r)
		t.Log(name, s.waitLog(t))
	}
}

// gate is a device whose operations wait.
type gate struct {
	*testDevice
	entered, leave chan struct{}
}

func newGate(size int) *gate {
	g := &gate{newTestDevice(size), make(chan struct{}, 100), make(chan struct{})}
	g.fail = func(string, int64, int64) error {
		g.entered <- struct{}{}
		<-g.leave
		return nil
	}
	return g
}

// TestPipelining: slow requests run at once, up to the limit, and a quick one
// overtakes them.
func TestPipelining(t *testing.T) {
	g := newGate(1 << 20)
	s := serve(t, Config{Workers: 4}, map[string]*Export{"": {Device: g}})
	r := dialRaw(t, s)
	r.goTo(true)
	for i := range uint64(6) {
		r.request(0, cmdTrim, i, i*512, 512)
	}
	for range 4 {
		<-g.entered
	}
	select {
	case <-g.entered:
		t.Error("more workers than allowed")
	case <-time.After(20 * time.Millisecond):
	}
	close(g.leave)
	seen := map[uint64]bool{}
	for range 6 {
		b := r.recv(simpleSize)
		seen[be.Uint64(b[8:])] = true
	}
	if len(seen) != 6 {
		t.Errorf("answers: %v", seen)
	}
}

// TestPaceChanges: a device that was quick and becomes slow does not stop
// other requests for long, and the replies that were held back come.
func TestPaceChanges(t *testing.T) {
	d := newTestDevice(1 << 20)
	s := serve(t, Config{}, map[string]*Export{"": {Device: d}})
	c := connect(t, s, "")
	p := make([]byte, 512)
	for range 500 {
		if _, err := c.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
	}
	var slow atomic.Int64
	d.fail = func(string, int64, int64) error {
		slow.Add(1)
		time.Sleep(5 * time.Millisecond)
		return nil
	}
	start := time.Now()
	done := make(chan error)
	for range 64 {
		go func() { _, err := c.ReadAt(make([]byte, 512), 0); done <- err }()
	}
	for range 64 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if d := time.Since(start); d > 200*time.Millisecond { // one by one: 320 ms
		t.Errorf("64 slow reads took %v", d)
	}
}

// TestShutdown answers what is in flight, then ends.
func TestShutdown(t *testing.T) {
	g := newGate(1 << 20)
	s := serve(t, Config{}, map[string]*Export{"": {Device: g}})
	idle, c := connect(t, s, ""), connect(t, s, "")
	answer := make(chan error)
	go func() { _, err := c.WriteAt(make([]byte, 1<<20), 0); answer <- err }()
	<-g.entered
	down := make(chan error)
	go func() { down <- s.Shutdown(context.Background()) }()
	<-idle.done // is let go at once
	select {
	case err := <-down:
		t.Fatalf("shutdown did not wait: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	close(g.leave)
	if err := errors.Join(<-answer, <-down); err != nil {
		t.Error(err)
	}
	if _, err := Dial(t.Context(), s.uri(""), nil); err == nil {
		t.Error("connected after shutdown")
	}
	if l := s.logged(); len(l) != 0 {
		t.Errorf("logged %v", l)
	}
}

func TestShutdownCutsOff(t *testing.T) {
	g := newGate(1 << 20)
	s := serve(t, Config{}, map[string]*Export{"": {Device: g}})
	c := connect(t, s, "")
	answer := make(chan error)
	go func() { answer <- c.Flush() }()
	<-g.entered
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	go func() { <-answer; close(g.leave) }() // cut off first; then the device lets go
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("shutdown: %v", err)
	}
}

// TestGone: an export that goes away ends its connections only, releases each
// look-up once, and can't be opened again.
func TestGone(t *testing.T) {
	gone := make(chan struct{})
	var released atomic.Int64
	e := &Export{Device: newTestDevice(1 << 20), Gone: gone, Release: func() { released.Add(1) }}
	s := serve(t, Config{}, map[string]*Export{"a": e, "b": {Device: newTestDevice(1 << 20)}})
	a, b := connect(t, s, "a"), connect(t, s, "b")
	if released.Load() != 1 { // by the choice of the context
		t.Errorf("released %d times", released.Load())
	}
	close(gone)
	<-a.done
	if err := a.Flush(); err == nil {
		t.Error("the export is still there")
	}
	if err := b.Flush(); err != nil {
		t.Errorf("the other export: %v", err)
	}
	if _, err := Dial(t.Context(), s.uri("a"), nil); !errors.Is(err, ErrUnknownExport) {
		t.Errorf("dial: %v", err)
	}
	b.Close()
	s.Close()
	if n := released.Load(); n != 4 { // two connections, two contexts... each look-up once
		t.Errorf("released %d times", n)
	}
}

func TestMaxConns(t *testing.T) {
	s := serve(t, Config{MaxConns: 2}, map[string]*Export{"": {Device: newTestDevice(1 << 20)}})
	a, _ := connect(t, s, ""), connect(t, s, "")
	if _, err := Dial(t.Context(), s.uri(""), nil); err == nil {
		t.Error("a third connection")
	}
	if err := s.waitLog(t); !strings.Contains(err.Error(), "too many") {
		t.Error(err)
	}
	a.Close()
	for range 100 {
		if c, err := Dial(t.Context(), s.uri(""), nil); err == nil {
			c.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("no room after one left")
}

// TestStalls: clients that stop in the middle are dropped, those that are
// idle between requests are not.
func TestStalls(t *testing.T) {
	d := newTestDevice(64 << 20)
	copy(d.data, noise(1, len(d.data)))
	for name, do := range map[string]func(r *raw){
		"handshake": func(r *raw) { r.greet(3) },
		"payload":   func(r *raw) { r.goTo(true); r.request(0, cmdWrite, 1, 0, 1<<20, 1, 2, 3) },
		"refused":   func(r *raw) { r.goTo(true); r.request(0, cmdWrite, 1, 1<<60, 1<<20, 1, 2, 3) },
		"replies": func(r *raw) {
			r.goTo(true)
			for range 10 {
				r.request(0, cmdRead, 1, 0, 8<<20)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, Config{Handshake: 50 * time.Millisecond, Stall: 50 * time.Millisecond}, map[string]*Export{"": {Device: d}})
			do(dialRaw(t, s))
			t.Log(s.waitLog(t))
		})
	}
	s := serve(t, Config{Handshake: 50 * time.Millisecond, Stall: 50 * time.Millisecond}, map[string]*Export{"": {Device: d}})
	c := connect(t, s, "")
	for range 3 {
		time.Sleep(150 * time.Millisecond)
		if _, err := c.WriteAt(make([]byte, 1<<20), 0); err != nil {
			t.Fatal(err)
		}
	}
}

func TestServeConn(t *testing.T) {
	s, err := NewServer(Config{Lookup: func(string) (*Export, error) {
		return &Export{Device: newTestDevice(1 << 20)}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	mine, its := net.Pipe()
	done := make(chan error)
	go func() { done <- s.ServeConn(its) }()
	c, err := NewClient(t.Context(), mine, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteAt(noise(1, 200<<10), 1); err != nil {
		t.Error(err)
	}
	c.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	s.Close()
}

// badListener fails for a while, then for ever.
type badListener struct {
	net.Listener
	calls int
}

func (l *badListener) Accept() (net.Conn, error) {
	if l.calls++; l.calls < 3 {
		return nil, errors.New("out of descriptors")
	}
	return nil, net.ErrClosed
}

func TestAcceptFails(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, Config{}, nil)
	bad := &badListener{Listener: l}
	if err := s.Serve(bad); !errors.Is(err, net.ErrClosed) || bad.calls != 3 || len(s.logged()) != 2 {
		t.Errorf("%v after %d calls, logged %v", err, bad.calls, s.logged())
	}
}
