package transport_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/dr"
	"farside/internal/transport"
)

func pipe() (net.Conn, net.Conn) {
	return transport.Pipe(transport.Peer{Role: transport.RoleAgent, Node: dr.NewNodeID(), Machine: dr.NewMachineID()},
		transport.Peer{Role: transport.RoleProcessServer, Node: dr.NewNodeID()})
}

func TestPipePeers(t *testing.T) {
	a, b := pipe()
	defer a.Close()
	defer b.Close()
	pa, err := transport.PeerOf(a)
	if err != nil || pa.Role != transport.RoleProcessServer {
		t.Errorf("%v, %v", pa, err)
	}
	pb, err := transport.PeerOf(b)
	if err != nil || pb.Role != transport.RoleAgent {
		t.Errorf("%v, %v", pb, err)
	}
	if a.RemoteAddr().String() != "pipe:process-server" || a.LocalAddr().Network() != "pipe" {
		t.Errorf("%v %v", a.RemoteAddr(), a.LocalAddr())
	}
}

func TestPipeCarriesAll(t *testing.T) {
	a, b := pipe()
	rnd := rand.New(rand.NewSource(1))
	want := make([]byte, 1<<20)
	rnd.Read(want)
	go func() {
		for rest := want; len(rest) > 0; {
			n := min(len(rest), 1+rnd.Intn(100_000))
			if _, err := a.Write(rest[:n]); err != nil {
				t.Error(err)
				break
			}
			rest = rest[n:]
		}
		a.Close()
	}()
	got, err := io.ReadAll(b)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
	if _, err := b.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("write to a closed end: %v", err)
	}
	b.Close()
	if _, err := b.Read(make([]byte, 1)); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("read from a closed end: %v", err)
	}
}

// TestPipeInBubble shows that the pipe is fit for simulated time: waiting on it lets time pass.
func TestPipeInBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pipe()
		start := time.Now()
		b.SetReadDeadline(start.Add(time.Hour))
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
		if d := time.Since(start); d != time.Hour {
			t.Errorf("waited %v", d)
		}
		b.SetReadDeadline(time.Time{})
		go func() {
			time.Sleep(time.Minute)
			a.Write([]byte("late"))
		}()
		buf := make([]byte, 10)
		if n, err := b.Read(buf); err != nil || string(buf[:n]) != "late" {
			t.Errorf("%q, %v", buf[:n], err)
		}
		a.SetWriteDeadline(time.Now().Add(time.Second))
		if n, err := a.Write(make([]byte, 1<<20)); !errors.Is(err, os.ErrDeadlineExceeded) || n != 64<<10 {
			t.Errorf("full pipe took %d, %v", n, err)
		}
		a.SetDeadline(time.Now().Add(-time.Second))
		if _, err := a.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
	})
}
