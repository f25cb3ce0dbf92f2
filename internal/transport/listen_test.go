package transport_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"farside/internal/dr"
	"farside/internal/transport"
	"farside/internal/transport/transporttest"
)

// brokenListener fails as a test wants.
type brokenListener struct {
	net.Listener
	errs chan error
}

type temporary struct{ error }

func (temporary) Temporary() bool { return true }
func (temporary) Timeout() bool   { return false }

func (b *brokenListener) Accept() (net.Conn, error) {
	select {
	case err := <-b.errs:
		return nil, err
	default:
		return b.Listener.Accept()
	}
}

func TestListenerEnds(t *testing.T) {
	site := transporttest.NewSite(t, nil)
	server := site.Identity(transport.RoleProcessServer)
	l, err := server.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		waiting <- err
	}()
	silent, err := net.Dial("tcp", l.Addr().String()) // its handshake must not hold up Close
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	time.Sleep(20 * time.Millisecond)
	start := time.Now()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("closing took %v", d)
	}
	if err := <-waiting; !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept ended with %v", err)
	}
	if _, err := server.Listen("no such host:1"); err == nil {
		t.Error("listened nowhere")
	}
}

func TestListenerFailures(t *testing.T) {
	site := transporttest.NewSite(t, nil)
	server := site.Identity(transport.RoleProcessServer)
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	broken := &brokenListener{Listener: raw, errs: make(chan error, 2)}
	broken.errs <- temporary{errors.New("too many open files")}
	l := server.Serve(broken)
	echo(t, l)
	if _, err := ask(site.Identity(transport.RoleAgent), raw.Addr().String(), server.Peer()); err != nil {
		t.Errorf("after a temporary failure: %v", err)
	}

	raw2, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	last := &brokenListener{Listener: raw2, errs: make(chan error, 2)}
	last.errs <- boom
	l = server.Serve(last)
	if _, err := l.Accept(); !errors.Is(err, boom) {
		t.Errorf("accept ended with %v", err)
	}
	l.Close()
}

// safeBuffer is a buffer that goroutines may share.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func TestRefusalsAreLogged(t *testing.T) {
	site, foreign := transporttest.NewSite(t, nil), transporttest.NewSite(t, nil)
	server := site.Identity(transport.RoleProcessServer)
	l := listen(t, server)
	var log safeBuffer
	l.SetLogger(slog.New(slog.NewTextHandler(&log, nil)))
	spy := foreign.Identity(transport.RoleAgent)
	if err := spy.Trust(site.CA.Authorities()); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(spy, l.Addr().String(), server.Peer()); !errors.Is(err, dr.ErrDenied) {
		t.Error(err)
	}
	for deadline := time.Now().Add(5 * time.Second); !strings.Contains(log.String(), "unknown authority"); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("log says %q", log.String())
		}
	}
}

// TestGarbage: whatever bytes come, the listener goes on for others.
func TestGarbage(t *testing.T) {
	site := transporttest.NewSite(t, nil)
	server := site.Identity(transport.RoleMasterTarget)
	addr := listen(t, server).Addr().String()
	for _, junk := range []string{"", "\x00", "GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\xff\xff" + strings.Repeat("x", 70000), strings.Repeat("\xff", 1000)} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(time.Second))
		io.WriteString(c, junk)
		c.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c)
		c.Close()
	}
	if _, err := ask(site.Identity(transport.RoleProcessServer), addr, server.Peer()); err != nil {
		t.Error(err)
	}
}
