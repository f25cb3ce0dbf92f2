package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// session is one client's connection, from the greeting to the end. The
// goroutine that calls run reads; workers answer.
type session struct {
	srv  *Server
	raw  net.Conn // as accepted; its deadlines and Close work from anywhere
	conn net.Conn // raw, or TLS over it; owned by the goroutine of run
	r    *bufio.Reader
	out  *sender

	// What negotiation settled; constant during transmission.
	export     *Export
	size       uint64
	flags      uint16
	structured bool
	allocation bool // base:allocation was chosen for the export

	// ctx ends with the connection or the server.
	ctx    context.Context
	cancel context.CancelFunc

	// pace is the average time, in ns, that the device takes for a short
	// request. It begins above what is quick.
	pace atomic.Int64

	mu struct {
		sync.Mutex
		draining bool
	}
}

// readAhead is how much of the stream is read in one system call.
const readAhead = 128 << 10

func newSession(s *Server, c net.Conn) *session {
	ss := &session{srv: s, raw: c, conn: c, r: bufio.NewReaderSize(c, readAhead)}
	ss.ctx, ss.cancel = context.WithCancel(s.ctx)
	ss.pace.Store(int64(2 * quickTime))
	return ss
}

// errDone is a connection that ends as the protocol wants.
var errDone = errors.New("done")

func (ss *session) run() error {
	defer ss.cancel()
	defer func() { ss.conn.Close() }() // TLS says good-bye
	err := ss.negotiate()
	if err == nil {
		defer ss.export.release()
		err = ss.transmit()
	}
	if errors.Is(err, errDone) || ss.isDraining() || ss.srv.ctx.Err() != nil {
		return nil
	}
	return err
}

// drain makes the reader stop at the next request that is not here yet.
func (ss *session) drain() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.mu.draining = true
	_ = ss.raw.SetReadDeadline(longAgo) // fails on a closed connection only
}

func (ss *session) isDraining() bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return ss.mu.draining
}

// readWithin lets the next reads take d at most, or for ever if d is zero. It
// must not undo drain.
func (ss *session) readWithin(d time.Duration) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.mu.draining {
		return
	}
	var t time.Time
	if d > 0 {
		t = time.Now().Add(d)
	}
	_ = ss.raw.SetReadDeadline(t) // an error shows in the read
}

// startTLS replaces the connection by an encrypted one.
func (ss *session) startTLS() error {
	if ss.r.Buffered() > 0 {
		// Sent in the clear before the reply: it must not be taken for
		// something that came through TLS.
		return errors.New("start TLS: data before the handshake")
	}
	t := tls.Server(ss.conn, ss.srv.cfg.TLS)
	if err := t.HandshakeContext(ss.ctx); err != nil {
		return fmt.Errorf("start TLS: %w", err)
	}
	ss.conn = t
	ss.r = bufio.NewReaderSize(t, readAhead)
	return nil
}

// transmit serves requests until the client goes, the export goes, or the
// stream breaks. When it returns, all workers are done.
func (ss *session) transmit() error {
	ss.readWithin(0)
	ss.out = newSender(ss.conn, ss.srv.mem, ss.srv.cfg.Stall)

	stop := context.AfterFunc(ss.ctx, func() { ss.raw.Close() })
	watched := make(chan struct{})
	go func() { // ends with ctx, which the defer below ends
		defer close(watched)
		select {
		case <-ss.export.Gone:
			ss.drain()
		case <-ss.ctx.Done():
		}
	}()
	defer func() { stop(); ss.cancel(); <-watched }()

	err := ss.dispatch()
	if e := ss.out.error(); e != nil {
		return fmt.Errorf("send replies: %w", e)
	}
	return err
}

// dispatch reads requests and has them served. Short ones of a device that is
// quick are served at once, and their replies held back a little to leave
// together: handing them over would cost more than serving them. The others
// go to workers, of which it starts as many as are needed at once and allowed.
func (ss *session) dispatch() error {
	var workers sync.WaitGroup
	requests := make(chan request)
	defer workers.Wait()
	defer close(requests)
	defer ss.out.flush()
	started, held := 0, 0
	for {
		q, err := ss.next()
		if err != nil {
			return err
		}
		if ss.quick(&q) {
			if held++; held > maxHeld || !ss.another() {
				held = 0
			}
			ss.out.hold(held > 0)
			ss.serve(q)
			continue
		}
		held = 0
		ss.out.flush()
		select {
		case requests <- q:
			continue
		default:
		}
		if started == ss.srv.cfg.Workers {
			requests <- q
			continue
		}
		started++
		workers.Go(func() {
			ss.serve(q)
			for q := range requests {
				ss.serve(q)
			}
		})
	}
}

const (
	// quickLength is the longest request that the reader serves itself.
	quickLength = 32 << 10
	// quickTime is how fast a device must answer such requests for that, on
	// the average. It is less than what waking a worker takes, or not much more.
	quickTime = 20 * time.Microsecond
	// maxHeld is how many replies are held back at most.
	maxHeld = 4
)

// quick reports whether q can be served before the next request is read.
func (ss *session) quick(q *request) bool {
	return q.timed() && time.Duration(ss.pace.Load()) < quickTime
}

// timed reports whether q is of the kind whose duration counts.
func (q *request) timed() bool {
	return q.cmd <= cmdWrite && q.flags&cmdFlagFUA == 0 && q.length <= quickLength
}

// keepPace notes how long the device took for a short request. The average
// forgets a slow one after some dozens of quick ones. Updates may get lost.
func (ss *session) keepPace(q *request, since time.Time) {
	if q.timed() {
		p := ss.pace.Load()
		ss.pace.Store(p + (int64(time.Since(since))-p)/8)
	}
}

// another reports whether a whole short request waits in the buffer.
func (ss *session) another() bool {
	if ss.r.Buffered() < requestSize {
		return false
	}
	head, _ := ss.r.Peek(requestSize) // it is there
	q, _ := parseRequest(head)
	return q.cmd == cmdRead || q.cmd == cmdWrite && ss.r.Buffered() >= requestSize+int(q.length)
}

// buffer gets memory for a request. Nothing is held back while it waits.
func (ss *session) buffer(n int) (*buffer, error) {
	if b := ss.srv.mem.tryGet(n); b != nil {
		return b, nil
	}
	ss.out.flush()
	return ss.srv.mem.get(ss.ctx, n)
}

// next reads one request, with its payload.
func (ss *session) next() (request, error) {
	head, err := ss.r.Peek(requestSize)
	if err != nil {
		return request{}, endOfRequests(len(head), err)
	}
	q, ok := parseRequest(head)
	if !ok {
		return q, fmt.Errorf("read request: bad magic %#x", head[:4])
	}
	_, _ = ss.r.Discard(requestSize) // peeked: it is there
	if q.cmd == cmdDisc {
		return q, errDone
	}
	q.err = ss.check(&q)
	if q.cmd == cmdWrite {
		err = ss.readPayload(&q)
	} else if q.cmd == cmdRead && q.err == nil {
		q.buf, err = ss.buffer(ss.readRoom(&q))
	}
	return q, err
}

func endOfRequests(got int, err error) error {
	if errors.Is(err, io.EOF) && got == 0 {
		return errDone // rude, but common and harmless
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read request: %w", err)
}

// readPayload reads what follows a write. A refused write has it too, and
// then it may be far longer than MaxRequest.
func (ss *session) readPayload(q *request) (err error) {
	n := int64(q.length)
	if n >= stallMin && n > int64(ss.r.Buffered()) {
		defer ss.readWithin(0)
	}
	if q.err != nil {
		return ss.inPieces(n, func(_, n int64) error {
			_, err := ss.r.Discard(int(n))
			return err
		})
	}
	if q.buf, err = ss.buffer(int(n)); err != nil {
		return err
	}
	data := q.buf.data()
	err = ss.inPieces(n, func(off, n int64) error {
		_, err := io.ReadFull(ss.r, data[off:off+n])
		return err
	})
	if err != nil {
		ss.srv.mem.put(q.buf)
	}
	return err
}

// stallMin is the shortest payload for which a client is timed: setting
// deadlines costs more than a small buffer that waits.
const stallMin = 64 << 10

// inPieces reads a payload so that each piece, not the whole, must come
// within the stall time: long requests may come over slow lines.
func (ss *session) inPieces(n int64, read func(off, n int64) error) error {
	for off := int64(0); off < n; {
		piece := min(n-off, pieceSize)
		if n >= stallMin && piece > int64(ss.r.Buffered()) {
			ss.readWithin(ss.srv.cfg.Stall)
		}
		if err := read(off, piece); err != nil {
			return fmt.Errorf("read payload: %w", err)
		}
		off += piece
	}
	return nil
}
