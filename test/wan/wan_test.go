package wan

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// inMemory returns a proxy and both ends of a connection through it.
func inMemory(t *testing.T) (p *Proxy, near, far net.Conn) {
	t.Helper()
	a, b := net.Pipe()
	c, d := net.Pipe()
	p = New(func(context.Context) (net.Conn, error) { return c, nil })
	p.Serve(b)
	return p, a, d
}

func TestRateIsExact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, near, far := inMemory(t)
		defer p.Close()
		p.Set(Line{Rate: 100_000})
		began := time.Now()
		go near.Write(make([]byte, 500_000))
		if _, err := io.ReadFull(far, make([]byte, 500_000)); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took < 4980*time.Millisecond || took > 5*time.Second {
			t.Errorf("500 kB at 100 kB/s took %v", took)
		}
		if up, down := p.Bytes(); up != 500_000 || down != 0 {
			t.Errorf("counted %d up, %d down", up, down)
		}
	})
}

func TestDelayDoesNotSlowTheRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, near, far := inMemory(t)
		defer p.Close()
		p.Set(Line{Rate: 1 << 20, Delay: 50 * time.Millisecond})
		began := time.Now()
		go near.Write(make([]byte, 1<<20))
		if _, err := io.ReadFull(far, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if first := time.Since(began); first < 50*time.Millisecond || first > 70*time.Millisecond {
			t.Errorf("the first byte took %v", first)
		}
		if _, err := io.ReadFull(far, make([]byte, 1<<20-1)); err != nil {
			t.Fatal(err)
		}
		if all := time.Since(began); all > 1100*time.Millisecond {
			t.Errorf("1 MiB at 1 MiB/s and 50 ms took %v", all)
		}
	})
}

func TestCutHoldsAndGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, near, far := inMemory(t)
		defer p.Close()
		p.Set(Line{Cut: true})
		go near.Write([]byte("late"))
		got := make(chan time.Duration)
		began := time.Now()
		go func() {
			_, _ = io.ReadFull(far, make([]byte, 4))
			got <- time.Since(began)
		}()
		time.Sleep(time.Hour)
		p.Set(Line{})
		if d := <-got; d != time.Hour {
			t.Errorf("arrived after %v", d)
		}
	})
}

func TestARateThatRisesIsFeltAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, near, far := inMemory(t)
		defer p.Close()
		p.Set(Line{Rate: 1}) // 1 MB would take twelve days
		go near.Write(make([]byte, 1_000_000))
		time.Sleep(time.Second)
		p.Set(Line{Rate: 1_000_000})
		began := time.Now()
		if _, err := io.ReadFull(far, make([]byte, 1_000_000)); err != nil || time.Since(began) > 2*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	})
}

// echo listens, and answers with what it is sent.
func echo(t *testing.T) (addr string, ended chan error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	ended = make(chan error, 8)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, err := io.Copy(c, c)
				c.Close()
				ended <- err
			}()
		}
	}()
	return l.Addr().String(), ended
}

func through(t *testing.T) (*Proxy, net.Conn, chan error) {
	t.Helper()
	addr, ended := echo(t)
	p, err := Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	c, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if got := ask(t, c, []byte("hello")); string(got) != "hello" {
		t.Fatalf("echo of hello: %q", got)
	}
	return p, c, ended
}

func ask(t *testing.T, c net.Conn, b []byte) []byte {
	t.Helper()
	go c.Write(b)
	got := make([]byte, len(b))
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatal(err)
	}
	return got
}

func TestBytesArriveWholeAndInOrder(t *testing.T) {
	p, c, ended := through(t)
	p.Set(Line{Rate: 20 << 20, Delay: time.Millisecond})
	b := make([]byte, 3<<20)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	if !bytes.Equal(ask(t, c, b), b) {
		t.Error("what came back differs")
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, c); n != 0 || err != nil {
		t.Errorf("after the end: %d bytes, %v", n, err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the far side ended with %v", err)
	}
}

func TestResetBreaksBothSides(t *testing.T) {
	p, c, ended := through(t)
	p.Reset()
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the near side reads %v, want a reset", err)
	}
	if err := <-ended; err == nil {
		t.Error("the far side saw an orderly end")
	}
	again, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	ask(t, again, []byte("new connections work"))
}

func TestHalfOpenIsSeenByTheFarSideOnly(t *testing.T) {
	p, c, ended := through(t)
	p.HalfOpen()
	<-ended
	if _, err := c.Write([]byte("into the void")); err != nil {
		t.Errorf("write: %v", err)
	}
	if err := c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read: %v, want nothing at all", err)
	}
	if n := p.Connections(); n != 0 {
		t.Errorf("%d connections", n)
	}
}
