package tap

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
	"farside/internal/nbd"
)

// badConn breaks after some bytes were written: it ends there, or from there on each 500th byte is flipped.
type badConn struct {
	net.Conn
	good int
	flip bool
}

var errCut = errors.New("cut")

func (c *badConn) Write(p []byte) (int, error) {
	if c.good >= len(p) {
		c.good -= len(p)
		return c.Conn.Write(p)
	}
	if !c.flip {
		n, _ := c.Conn.Write(p[:c.good])
		c.Conn.Close()
		return n, errCut
	}
	q := bytes.Clone(p)
	for i := c.good; i < len(q); i += 500 {
		q[i] ^= 1 << (i % 8)
	}
	c.good = 0
	return c.Conn.Write(q)
}

// TestWritersVanish: writers lose their connections in the middle of requests, or send broken ones, and come again.
// What the stream says is what is on the disk, and the next writer is served.
func TestWritersVanish(t *testing.T) {
	const size = 4 << 20
	path := tempPath(t, size)
	tap, uri := open(t, Options{Disks: []capture.Disk{{ID: 1, Path: path}}, Queue: 1 << 30})
	where, err := nbd.ParseURI(uri(""))
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	var cut atomic.Int32
	for g := range 6 {
		work.Go(func() {
			rng := rand.New(rand.NewPCG(11, uint64(g)))
			for range 25 {
				if vanish(t, where.Address, rng) {
					cut.Add(1)
				}
			}
		})
	}
	work.Wait()
	last := dial(t, uri(""))
	if _, err := last.WriteFUA(bytes.Repeat([]byte{9}, 4096), size-4096); err != nil {
		t.Errorf("the writer after them: %v", err)
	}
	last.Close()
	if err := tap.server.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	images := map[dr.DiskID][]byte{1: make([]byte, size)}
	drain(t, tap, images)
	disk, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(images[1], disk) || disk[size-1] != 9 {
		t.Error("stream and disk differ")
	}
	if s := tap.Stats(); cut.Load() < 50 || s.Writes < 100 || s.Overflows != 0 {
		t.Errorf("%d of 150 were cut, stats %+v", cut.Load(), s)
	}
}

// vanish writes over a connection that breaks, and reports whether it saw that.
func vanish(t *testing.T, socket string, rng *rand.Rand) bool {
	raw, err := net.Dial("unix", socket)
	if err != nil {
		t.Error(err)
		return false
	}
	if err := raw.SetDeadline(time.Now().Add(2 * time.Second)); err != nil { // a flipped length makes both sides wait
		t.Error(err)
	}
	c, err := nbd.NewClient(t.Context(), &badConn{raw, 200 + rng.IntN(400<<10), rng.IntN(2) == 0}, "")
	if err != nil {
		return true // it broke in the handshake
	}
	defer c.Close()
	for i := range 40 {
		off, n := rng.Int64N(500)*4096, 512*(1+rng.Int64N(100))
		switch rng.IntN(6) {
		case 0:
			err = c.Zero(off, n)
		case 1:
			err = c.Trim(off, n)
		case 2:
			err = c.Flush()
		default:
			_, err = c.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, int(n)), off)
		}
		if err != nil {
			return true
		}
	}
	return false
}

// counted counts flushes, and may refuse them.
type counted struct {
	*File
	flushes atomic.Int32
	err     error
}

func (c *counted) Flush() error {
	c.flushes.Add(1)
	return errors.Join(c.err, c.File.Flush())
}

// TestDurability: a flush, and a write with FUA, reach the backing before they are answered; their failure reaches the writer.
func TestDurability(t *testing.T) {
	f := &counted{File: tempFile(t, 1<<20)}
	c, tap := pipeTo(t, f)
	want := int32(0)
	check := func(what string, flushed bool, err error) {
		t.Helper()
		if flushed {
			want++
		}
		if got := f.flushes.Load(); got != want || (err != nil) != (f.err != nil && flushed) {
			t.Errorf("%s: %d flushes, want %d; %v", what, got, want, err)
		}
	}
	data := make([]byte, 4096)
	_, err := c.WriteAt(data, 0)
	check("write", false, err)
	check("flush", true, c.Flush())
	_, err = c.WriteFUA(data, 8192)
	check("write with FUA", true, err)
	f.err = errors.New("disk is full")
	check("flush that fails", true, c.Flush())
	_, err = c.WriteFUA(data, 8192)
	check("write with FUA that fails", true, err)
	flushes := 0
	for _, e := range drain(t, tap, map[dr.DiskID][]byte{1: make([]byte, 1<<20)}) {
		if e.Kind == capture.Flush {
			flushes++
		}
	}
	if flushes != int(want) {
		t.Errorf("%d flushes in the stream, want %d", flushes, want)
	}
}

// pipeTo serves a backing over a pipe.
func pipeTo(t testing.TB, b Backing) (*nbd.Client, *Tap) {
	t.Helper()
	here, tap, end := servePipe(t, b)
	t.Cleanup(end)
	c, err := nbd.NewClient(context.Background(), here, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, tap
}

// servePipe returns one end of a connection to a tap; end waits until the server is done with it.
func servePipe(t testing.TB, b Backing) (here net.Conn, tap *Tap, end func()) {
	t.Helper()
	tap, err := New([]Disk{{ID: 1, Backing: b}}, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := nbd.NewServer(nbd.Config{Lookup: tap.Lookup, List: tap.Names, Handshake: time.Second, Stall: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	here, there := net.Pipe()
	l := &oneConn{conn: there, closed: make(chan struct{})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	return here, tap, func() {
		here.Close()
		if err := srv.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		<-served
	}
}

// oneConn is a listener that accepts one connection.
type oneConn struct {
	mu     sync.Mutex
	conn   net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	l.mu.Lock()
	c := l.conn
	l.conn = nil
	l.mu.Unlock()
	if c != nil {
		return c, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}

func (l *oneConn) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

// request makes the header of a request, for seeds.
func request(cmd, flags uint16, off uint64, n uint32, data ...byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0x25609513)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, 1)
	b = binary.BigEndian.AppendUint64(b, off)
	b = binary.BigEndian.AppendUint32(b, n)
	return append(b, data...)
}

// FuzzWriter: whatever a writer sends after the handshake, the stream says what is on the disk then.
func FuzzWriter(f *testing.F) {
	write := request(1, 0, 512, 512, bytes.Repeat([]byte{7}, 512)...)
	f.Add(write)
	f.Add(append(bytes.Clone(write), request(6, 0, 0, 1024)...))
	f.Add(append(bytes.Clone(write), request(4, 0, 512, 512)...))
	f.Add(request(1, 1, 1<<63, 512))
	f.Add(request(1, 0, 100, 100, make([]byte, 100)...))
	f.Add(request(0, 0, 0, 4096))
	f.Add(request(2, 0, 0, 0))
	path := filepath.Join(f.TempDir(), "disk")
	f.Fuzz(func(t *testing.T, sent []byte) {
		const size = 64 << 10
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := OpenFile(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		here, tap, end := servePipe(t, file)
		go io.Copy(io.Discard, here) // until end closes it
		hello := append([]byte{0, 0, 0, 3}, "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00"...)
		_ = here.SetDeadline(time.Now().Add(time.Second))
		_, _ = here.Write(append(hello, sent...)) // it may hang up on us
		end()
		images := map[dr.DiskID][]byte{1: make([]byte, size)}
		drain(t, tap, images)
		disk := make([]byte, size)
		if _, err := tap.ReadAt(disk, 1, 0); err != nil || !bytes.Equal(disk, images[1]) {
			t.Errorf("stream and disk differ, %v", err)
		}
	})
}
