package transport

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// pipeBuffer is how many bytes one direction of a pipe holds, as a socket would.
const pipeBuffer = 64 << 10

// Pipe returns the two ends of a connection in memory between left and right,
// with deadlines, a buffer of 64 KiB in each direction, and close as of TCP: what was written
// before is still read, then io.EOF. PeerOf the first end returns right.
func Pipe(left, right Peer) (net.Conn, net.Conn) {
	there, back := newStream(), newStream()
	return &pipeEnd{in: back, out: there, self: left, peer: right},
		&pipeEnd{in: there, out: back, self: right, peer: left}
}

// pipeEnd is one end of a Pipe.
type pipeEnd struct {
	in, out    *stream
	self, peer Peer
}

// Peer returns who is at the other end.
func (p *pipeEnd) Peer() Peer { return p.peer }

func (p *pipeEnd) Read(b []byte) (int, error)  { return p.in.read(b) }
func (p *pipeEnd) Write(b []byte) (int, error) { return p.out.write(b) }

// Close ends both directions: the other end reads what is left, then io.EOF, and
// can't write any more.
func (p *pipeEnd) Close() error {
	p.in.close(true)
	p.out.close(false)
	return nil
}

func (p *pipeEnd) LocalAddr() net.Addr  { return pipeAddr(p.self.Role) }
func (p *pipeEnd) RemoteAddr() net.Addr { return pipeAddr(p.peer.Role) }

func (p *pipeEnd) SetDeadline(t time.Time) error {
	p.in.readDeadline.set(t)
	p.out.writeDeadline.set(t)
	return nil
}

func (p *pipeEnd) SetReadDeadline(t time.Time) error {
	p.in.readDeadline.set(t)
	return nil
}

func (p *pipeEnd) SetWriteDeadline(t time.Time) error {
	p.out.writeDeadline.set(t)
	return nil
}

type pipeAddr string

func (pipeAddr) Network() string  { return "pipe" }
func (a pipeAddr) String() string { return "pipe:" + string(a) }

// stream is one direction of a pipe.
type stream struct {
	readDeadline, writeDeadline *deadline
	mu                          struct {
		sync.Mutex
		buf     []byte
		closed  bool          // by the writer: the reader gets the rest
		dropped bool          // by the reader: nobody will read
		changed chan struct{} // closed and replaced whenever anything above changes
	}
}

func newStream() *stream {
	s := &stream{readDeadline: newDeadline(), writeDeadline: newDeadline()}
	s.mu.changed = make(chan struct{})
	return s
}

func (s *stream) changedLocked() {
	close(s.mu.changed)
	s.mu.changed = make(chan struct{})
}

func (s *stream) read(b []byte) (int, error) {
	for {
		expired := s.readDeadline.wait()
		s.mu.Lock()
		changed := s.mu.changed
		switch {
		case s.mu.dropped:
			s.mu.Unlock()
			return 0, io.ErrClosedPipe
		case isClosed(expired):
			s.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		case len(s.mu.buf) > 0 || len(b) == 0:
			n := copy(b, s.mu.buf)
			s.mu.buf = append(s.mu.buf[:0], s.mu.buf[n:]...)
			s.changedLocked()
			s.mu.Unlock()
			return n, nil
		case s.mu.closed:
			s.mu.Unlock()
			return 0, io.EOF
		}
		s.mu.Unlock()
		select {
		case <-changed:
		case <-expired:
		}
	}
}

func (s *stream) write(b []byte) (n int, err error) {
	for {
		expired := s.writeDeadline.wait()
		s.mu.Lock()
		changed := s.mu.changed
		switch {
		case s.mu.closed || s.mu.dropped:
			s.mu.Unlock()
			return n, io.ErrClosedPipe
		case isClosed(expired):
			s.mu.Unlock()
			return n, os.ErrDeadlineExceeded
		}
		if m := min(len(b), pipeBuffer-len(s.mu.buf)); m > 0 {
			s.mu.buf = append(s.mu.buf, b[:m]...)
			b, n = b[m:], n+m
			s.changedLocked()
		}
		s.mu.Unlock()
		if len(b) == 0 {
			return n, nil
		}
		select {
		case <-changed:
		case <-expired:
		}
	}
}

func (s *stream) close(byReader bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if byReader {
		s.mu.dropped, s.mu.buf = true, nil
	} else {
		s.mu.closed = true
	}
	s.changedLocked()
}

// deadline is a moment after which waiting ends; it may be moved.
type deadline struct {
	mu struct {
		sync.Mutex
		timer   *time.Timer
		expired chan struct{}
		round   int // guards against a timer that fires while it is being replaced
	}
}

func newDeadline() *deadline {
	d := &deadline{}
	d.mu.expired = make(chan struct{})
	return d
}

// wait returns a channel that is closed when the deadline has passed.
func (d *deadline) wait() chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mu.expired
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.timer != nil {
		d.mu.timer.Stop()
		d.mu.timer = nil
	}
	d.mu.round++
	if isClosed(d.mu.expired) {
		d.mu.expired = make(chan struct{})
	}
	if t.IsZero() {
		return
	}
	left := time.Until(t)
	if left <= 0 {
		close(d.mu.expired)
		return
	}
	round := d.mu.round
	d.mu.timer = time.AfterFunc(left, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.mu.round == round {
			close(d.mu.expired)
		}
	})
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
