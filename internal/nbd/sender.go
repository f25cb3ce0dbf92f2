package nbd

import (
	"net"
	"sync"
	"time"
)

// outgoing is a contiguous piece of the stream to the client. Its buffer, if
// any, goes back to the pool once it is sent.
type outgoing struct {
	bytes []byte
	buf   *buffer
}

// sender writes the replies of one connection. Whoever finds it idle writes,
// for itself and for those who come meanwhile; the others only queue. So
// replies that are ready together leave in one system call, and no goroutine
// is needed. The queue is bounded by the buffers and workers that feed it.
type sender struct {
	conn  net.Conn
	mem   *memory
	stall time.Duration
	// gather: the connection can take several pieces in one call (writev).
	// TLS can't: small pieces are copied together instead.
	gather bool

	mu struct {
		sync.Mutex
		queue []outgoing
		spare []outgoing
		busy  bool
		held  bool
		err   error
	}
	// Of the one that set busy:
	vec      net.Buffers
	scratch  []byte
	deadline time.Time
}

const scratchSize = 64 << 10

func newSender(c net.Conn, m *memory, stall time.Duration) *sender {
	s := &sender{conn: c, mem: m, stall: stall}
	switch c.(type) {
	case *net.TCPConn, *net.UnixConn:
		s.gather = true
	}
	return s
}

// send queues the pieces next to each other and sees that they get written.
// It takes over their buffers. The first error stays in the sender and closes
// the connection.
func (s *sender) send(pieces ...outgoing) {
	s.mu.Lock()
	if s.mu.err != nil {
		defer s.mu.Unlock()
		s.release(pieces)
		return
	}
	s.mu.queue = append(s.mu.queue, pieces...)
	if s.mu.busy || s.mu.held {
		s.mu.Unlock()
		return
	}
	s.mu.busy = true
	for len(s.mu.queue) > 0 && s.mu.err == nil {
		batch := s.mu.queue
		s.mu.queue = s.mu.spare[:0]
		s.mu.Unlock()
		err := s.write(batch)
		s.release(batch)
		clear(batch)
		s.mu.Lock()
		s.mu.spare = batch[:0]
		s.mu.err = err
	}
	s.release(s.mu.queue)
	s.mu.queue = s.mu.queue[:0]
	s.mu.busy = false
	err := s.mu.err
	s.mu.Unlock()
	if err != nil {
		s.conn.Close() // wakes the reader, which reports
	}
}

// hold lets replies only queue, or ends that; then the next send writes them.
// Who holds them must flush before it waits for anything.
func (s *sender) hold(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.held = on
}

// flush ends a hold and writes what was held back.
func (s *sender) flush() {
	s.hold(false)
	s.send()
}

func (s *sender) release(pieces []outgoing) {
	for _, p := range pieces {
		s.mem.put(p.buf)
	}
}

// error returns why nothing can be sent any more, or nil.
func (s *sender) error() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.err
}

func (s *sender) write(batch []outgoing) error {
	s.extend()
	if len(batch) == 1 {
		_, err := s.conn.Write(batch[0].bytes)
		return err
	}
	if !s.gather {
		return s.writeCopied(batch)
	}
	s.vec = s.vec[:0]
	for _, p := range batch {
		s.vec = append(s.vec, p.bytes)
	}
	vec := s.vec // WriteTo consumes its receiver
	_, err := vec.WriteTo(s.conn)
	clear(s.vec)
	return err
}

// writeCopied joins small pieces, because each Write costs a TLS record.
func (s *sender) writeCopied(batch []outgoing) error {
	if s.scratch == nil {
		s.scratch = make([]byte, 0, scratchSize)
	}
	joined := s.scratch[:0]
	for _, p := range batch {
		if len(joined)+len(p.bytes) > scratchSize && len(joined) > 0 {
			if _, err := s.conn.Write(joined); err != nil {
				return err
			}
			joined = joined[:0]
		}
		if len(p.bytes) > scratchSize {
			if _, err := s.conn.Write(p.bytes); err != nil {
				return err
			}
			continue
		}
		joined = append(joined, p.bytes...)
	}
	if len(joined) == 0 {
		return nil
	}
	_, err := s.conn.Write(joined)
	return err
}

// extend moves the write deadline on, but not for every reply: it is only
// there to get rid of clients that stopped reading.
func (s *sender) extend() {
	if s.stall <= 0 {
		return
	}
	if now := time.Now(); s.deadline.Sub(now) < s.stall {
		s.deadline = now.Add(2 * s.stall)
		_ = s.conn.SetWriteDeadline(s.deadline) // an error shows in the write
	}
}
