package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
)

func noise(seed uint64, n int) []byte {
	p := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed)})
	r.Read(p)
	return p
}

// TestRoundTrip writes and reads sizes around the limits, in both reply forms
// of the server (holes and data).
func TestRoundTrip(t *testing.T) {
	d := newTestDevice(80 << 20)
	s := serve(t, Config{}, map[string]*Export{"": {Device: d}})
	c := connect(t, s, "")
	if c.Size() != 80<<20 || c.ReadOnly() || c.MultiConn() || c.MinBlock() != 1 {
		t.Fatalf("size %d, read-only %v, multi %v", c.Size(), c.ReadOnly(), c.MultiConn())
	}
	for i, n := range []int{1, 512, 4096, 65535, unit, 1<<20 - 1, 1 << 20, 3<<20 + 7, MaxRequest, MaxRequest + 1} {
		off := int64(i) * 131
		want := noise(uint64(i), n)
		if m, err := c.WriteAt(want, off); m != n || err != nil {
			t.Fatalf("write %d: %d, %v", n, m, err)
		}
		// Read with a margin: it has holes behind the data.
		got := bytes.Repeat([]byte{0xaa}, n+2*unit)
		if m, err := c.ReadAt(got, off); m != len(got) || err != nil {
			t.Fatalf("read %d: %d, %v", n, m, err)
		}
		if !bytes.Equal(got[:n], want) || !bytes.Equal(got, d.data[off:][:len(got)]) {
			t.Fatalf("%d bytes at %d differ", n, off)
		}
		if err := c.Zero(0, c.Size()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestClientCommands(t *testing.T) {
	d := newTestDevice(1 << 20)
	d.multi = true
	s := serve(t, Config{}, map[string]*Export{"x": {Device: d}})
	c := connect(t, s, "x")
	if !c.MultiConn() {
		t.Error("multi-conn was not advertised")
	}
	steps := []struct {
		name string
		do   func() error
		ok   func() bool
	}{
		{"fua", func() error { _, err := c.WriteFUA([]byte{1}, 7); return err }, func() bool { return d.flushes.Load() == 1 && d.data[7] == 1 }},
		{"flush", c.Flush, func() bool { return d.flushes.Load() == 2 }},
		{"trim", func() error { return c.Trim(0, unit) }, func() bool { return d.data[7] == 0 && d.hole[0] }},
		{"no hole", func() error { return c.ZeroNoHole(0, unit) }, func() bool { return !d.hole[0] }},
		{"zero", func() error { return c.Zero(0, unit) }, func() bool { return d.hole[0] }},
		{"prefetch", func() error { return c.Prefetch(0, 999) }, func() bool { return d.fetched.Load() == 999 }},
	}
	for _, st := range steps {
		if err := st.do(); err != nil || !st.ok() {
			t.Errorf("%s: %v, effect seen: %v", st.name, err, st.ok())
		}
	}
	c.WriteAt([]byte{1}, 3*unit)
	var got []int64
	err := c.Map(10, 5*unit, func(off, n int64, zero, hole bool) error {
		if zero != hole {
			t.Errorf("zero %v, hole %v", zero, hole)
		}
		if !hole {
			got = append(got, off, n)
		}
		return nil
	})
	if err != nil || len(got) != 2 || got[0] != 3*unit || got[1] != unit {
		t.Errorf("map: %v, data %v", err, got)
	}
}

func TestClientRefusesRanges(t *testing.T) {
	s := serve(t, Config{}, map[string]*Export{"": {Device: newTestDevice(1000)}})
	c := connect(t, s, "")
	if n, err := c.ReadAt(make([]byte, 10), 995); n != 5 || !errors.Is(err, io.EOF) {
		t.Errorf("read over the end: %d, %v", n, err)
	}
	if n, err := c.ReadAt(make([]byte, 10), 2000); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("read behind the end: %d, %v", n, err)
	}
	_, err := c.ReadAt(make([]byte, 1), -1)
	_, err2 := c.WriteAt(make([]byte, 10), 995)
	if !errors.Is(err, EINVAL) || !errors.Is(err2, EINVAL) || !errors.Is(c.Zero(0, -1), EINVAL) {
		t.Errorf("bad ranges: %v; %v", err, err2)
	}
}

// TestErrorsTravel checks that a device's errors reach the client as what
// they are, and that the connection goes on.
func TestErrorsTravel(t *testing.T) {
	d := newTestDevice(4 << 20)
	s := serve(t, Config{}, map[string]*Export{"": {Device: d}})
	c := connect(t, s, "")
	tests := []struct{ err, want error }{
		{errors.New("disk on fire"), EIO},
		{ENOMEM, ENOMEM},
		{syscall.ENOSPC, ENOSPC},
		{fs.ErrPermission, EPERM},
		{fs.ErrPermission, fs.ErrPermission},
		{syscall.EINVAL, EINVAL},
		{context.Canceled, ESHUTDOWN},
		{io.ErrUnexpectedEOF, EIO},
	}
	buf := make([]byte, 3<<20)
	for _, test := range tests {
		d.fail = func(op string, off, _ int64) error {
			if op == "read" && off < 1<<20 {
				return nil // so that the error comes after a good piece
			}
			if op == "map" {
				return errors.New("no map: reads must work without")
			}
			return test.err
		}
		_, err1 := c.ReadAt(buf, 0)
		_, err2 := c.WriteAt(buf, 0)
		for _, err := range []error{err1, err2, c.Flush(), c.Trim(0, 1), c.Zero(0, 1)} {
			if !errors.Is(err, test.want) {
				t.Errorf("device says %v: client got %v", test.err, err)
			}
		}
	}
	d.fail = nil
	if _, err := c.ReadAt(buf, 0); err != nil {
		t.Errorf("after the errors: %v", err)
	}
}

// TestPlainDevice: what a device can't do is done for it or not offered.
func TestPlainDevice(t *testing.T) {
	d := newTestDevice(3 << 20)
	s := serve(t, Config{}, map[string]*Export{"": {Device: plain{d}}})
	c := connect(t, s, "")
	if err := c.Trim(0, 1); err != nil || c.flags&(txSendTrim|txSendFastZero) != 0 {
		t.Errorf("trim: %v, flags %#x", err, c.flags)
	}
	copy(d.data, noise(1, len(d.data)))
	if err := c.Zero(1, 2<<20+1); err != nil {
		t.Fatal(err)
	}
	if d.data[0] == 0 && d.data[2<<20+2] == 0 || !bytes.Equal(d.data[1:2<<20+2], make([]byte, 2<<20+1)) {
		t.Error("not exactly the range was zeroed")
	}
	n := 0
	if err := c.Map(5, 100, func(off, l int64, zero, hole bool) error { n++; return nil }); err != nil || n != 1 {
		t.Errorf("map of a device without: %v, %d extents", err, n)
	}
	if err := c.Prefetch(0, 100); err != nil {
		t.Error(err)
	}
	// A range that a Zeroer refuses as unsupported is written.
	d.fail = func(op string, _, _ int64) error {
		if op == "zero" {
			return errors.ErrUnsupported
		}
		return nil
	}
	s2 := serve(t, Config{}, map[string]*Export{"": {Device: d}})
	c2 := connect(t, s2, "")
	d.data[9] = 1
	if err := c2.Zero(0, 10); err != nil || d.data[9] != 0 {
		t.Errorf("fall back: %v, %d", err, d.data[9])
	}
	if err := c2.zero(cmdFlagFastZero, 0, 10); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("fast zero: %v", err)
	}
}

// TestParallel lets many goroutines work on their own parts through two
// connections, with a small memory.
func TestParallel(t *testing.T) {
	d := newTestDevice(16 << 20)
	s := serve(t, Config{Memory: 1, Workers: 4}, map[string]*Export{"": {Device: d}})
	clients := []*Client{connect(t, s, ""), connect(t, s, "")}
	var work sync.WaitGroup
	for g := range 16 {
		work.Go(func() {
			c, base := clients[g%2], int64(g)<<20
			for i := range 50 {
				want := noise(uint64(g*50+i), 1+(i*7919)%(1<<17))
				got := make([]byte, len(want))
				if _, err := c.WriteAt(want, base); err != nil {
					t.Error(err)
					return
				}
				if _, err := c.ReadAt(got, base); err != nil || !bytes.Equal(got, want) {
					t.Errorf("goroutine %d round %d: %v", g, i, err)
					return
				}
			}
		})
	}
	work.Wait()
}

func TestClientClose(t *testing.T) {
	d := newTestDevice(1 << 20)
	entered, leave := make(chan struct{}), make(chan struct{})
	d.fail = func(op string, _, _ int64) error {
		if op == "read" {
			close(entered)
			<-leave
		}
		return nil
	}
	s := serve(t, Config{}, map[string]*Export{"": {Device: d}})
	c := connect(t, s, "")
	failed := make(chan error)
	go func() { _, err := c.ReadAt(make([]byte, 1), 0); failed <- err }()
	<-entered
	c.Close()
	if err := <-failed; !errors.Is(err, ErrClientClosed) {
		t.Errorf("call in flight: %v", err)
	}
	close(leave)
	if err := c.Flush(); !errors.Is(err, ErrClientClosed) {
		t.Errorf("call after close: %v", err)
	}
	c.Close()
}

func TestURI(t *testing.T) {
	good := map[string]URI{
		"nbd://h/x":                            {"tcp", "h:10809", "x", false},
		"nbds://h:1/a/b":                       {"tcp", "h:1", "a/b", true},
		"nbd://[::1]:5":                        {"tcp", "[::1]:5", "", false},
		"nbd+unix:///?socket=/a/b":             {"unix", "/a/b", "", false},
		"nbds+unix:///n%20m?socket=/a%20b%2Fc": {"unix", "/a b/c", "n m", true},
	}
	for s, want := range good {
		got, err := ParseURI(s)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
		if again, err := ParseURI(got.String()); err != nil || again != want {
			t.Errorf("%s: written as %s: %+v, %v", s, got, again, err)
		}
	}
	for _, s := range []string{"", "http://h", "nbd://", "nbd+unix:///x", "nbd+unix://h/?socket=/a", "nbd+vsock://1", "nbd://h:x", ":"} {
		if u, err := ParseURI(s); err == nil {
			t.Errorf("%q was taken for %+v", s, u)
		}
	}
}
