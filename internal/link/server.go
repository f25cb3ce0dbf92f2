package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"farside/internal/dr"
)

// errReplaced ends a stream when its sender has connected again: the old
// connection is dead, even if nothing has told us yet.
var errReplaced = fmt.Errorf("the stream has a newer connection: %w", dr.ErrUnavailable)

// ErrDropped ends a stream that its own side cut, so that the sender connects
// again and learns the new cursor.
var ErrDropped = fmt.Errorf("the stream was cut to start from a new cursor: %w", dr.ErrUnavailable)

// Server receives the streams of many machines, one connection each at a time.
type Server struct {
	// Authorize decides whether the peer of conn may send this stream.
	Authorize func(conn net.Conn, h Hello) error
	// Open returns the sink of an authorised stream; no other connection uses
	// it any more.
	Open Open

	mu struct {
		sync.Mutex
		streams map[dr.MachineID]*served
	}
}

type served struct {
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when the connection is done with its sink
}

// Serve receives the stream at conn. It always returns an error and closes conn.
func (s *Server) Serve(ctx context.Context, conn net.Conn) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	own := &served{cancel: cancel, done: make(chan struct{})}
	var machine dr.MachineID
	defer func() {
		close(own.done)
		s.leave(machine, own)
	}()
	return Receive(ctx, conn, func(ctx context.Context, h Hello) (Sink, error) {
		if err := s.Authorize(conn, h); err != nil {
			return nil, err
		}
		machine = h.Machine
		s.enter(h.Machine, own)
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		return s.Open(ctx, h)
	})
}

// Accept serves the connections of l until ctx ends, when l must be closed by
// its owner, and waits for all of them; it then returns nil. ended, called by
// several goroutines, is told why each connection ended.
func (s *Server) Accept(ctx context.Context, l net.Listener, ended func(net.Conn, error)) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			if conn != nil {
				return conn.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept streams: %w", err)
		}
		wg.Go(func() { ended(conn, s.Serve(ctx, conn)) })
	}
}

// enter makes own the connection of the machine's stream and waits until the
// one before has ended, even if own is cancelled meanwhile: whoever waits for
// own then knows that the one before it is done too.
func (s *Server) enter(id dr.MachineID, own *served) {
	s.mu.Lock()
	if s.mu.streams == nil {
		s.mu.streams = map[dr.MachineID]*served{}
	}
	before := s.mu.streams[id]
	s.mu.streams[id] = own
	s.mu.Unlock()
	if before != nil {
		before.cancel(errReplaced)
		<-before.done
	}
}

func (s *Server) leave(id dr.MachineID, own *served) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.streams[id] == own {
		delete(s.mu.streams, id)
	}
}

// Drop cuts the connection of a machine's stream, if there is one, and waits
// until its sink is in use no more. It must not be called from the sink.
func (s *Server) Drop(id dr.MachineID) {
	s.mu.Lock()
	own := s.mu.streams[id]
	s.mu.Unlock()
	if own != nil {
		own.cancel(ErrDropped)
		<-own.done
	}
}

// Connected reports whether the machine's stream has a connection.
func (s *Server) Connected(id dr.MachineID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.streams[id] != nil
}

// IsFinal reports whether connecting again can't help before something else
// changes: the assignment, the software, or the timeline.
func IsFinal(err error) bool {
	for _, kind := range []error{dr.ErrVersion, dr.ErrDenied, dr.ErrTimeline} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}
