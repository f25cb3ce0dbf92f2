package link

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"time"

	"farside/internal/frame"
)

// Sink takes the frames of a stream. Append and Sync may run at the same
// time; each is called by one goroutine.
type Sink interface {
	// Cursor returns what the first frame must continue. It is called once, after
	// a Sync, and counts as stored: the sender forgets what lies before it.
	Cursor() frame.Cursor
	// Append takes frames that were verified and follow one another. It may
	// wait for room, until ctx ends.
	Append(ctx context.Context, frames []*frame.Frame) error
	// Sync makes what was appended before the call durable here and raises
	// Progress.
	Sync() error
	// Progress says how far the sink has come.
	Progress() *Progress
}

// Open decides about a stream: it returns its sink, or an error, which the
// sender is told with the code of its dr kind (a *Refused as it is; any other: not ready).
type Open func(context.Context, Hello) (Sink, error)

// Receive serves the stream that the sender at conn introduces, until ctx ends
// or something breaks; it always returns an error and closes conn. Frames are
// verified before a sink sees them: a damaged one, a gap or a foreign stream is
// refused and nothing of it is applied.
//
// Two Receives must not use one sink: see Server.
func Receive(ctx context.Context, conn net.Conn, open Open) error {
	s := &receiveShell{
		open: open, conn: conn, w: newWriter(conn), r: bufio.NewReaderSize(liveReader{conn}, readBuffer),
		appended: make(chan struct{}, 1), ready: make(chan struct{}), readDone: make(chan struct{}), queue: newQueue(),
	}
	s.calls = newCaller(s.w, nil)
	return fmt.Errorf("receive stream: %w", run(ctx, conn, s.read, s.apply, s.sync, s.ack, s.calls.keep, s.w.keepAlive))
}

type receiveShell struct {
	open     Open
	conn     net.Conn
	w        *writer
	r        *bufio.Reader
	appended chan struct{} // has a token when there is something to sync
	ready    chan struct{} // closed when sink is set
	readDone chan struct{} // closed when read has ended
	queue    *queue
	calls    *Caller

	sink Sink
	core receiver // of read
}

// refuse tells the sender why and returns err. Only read, which owns the
// receiving direction, may call it; others use refuseBeside.
func (s *receiveShell) refuse(err error) error {
	if werr := s.w.write(refusal(err).encode()); werr != nil {
		return fmt.Errorf("%w (and telling the sender: %w)", err, werr)
	}
	// Closing with unread bytes would reset the connection, and the refusal be lost.
	if s.conn.SetReadDeadline(time.Now().Add(lingerFor)) == nil {
		_, _ = io.Copy(io.Discard, s.conn) // ends with an error by design
	}
	return err
}

// refuseBeside is refuse while read goes on: it reads to no effect until the sender
// has gone.
func (s *receiveShell) refuseBeside(ctx context.Context, err error) error {
	s.queue.drop(err)
	if ctx.Err() != nil {
		return err
	}
	if werr := s.w.write(refusal(err).encode()); werr != nil {
		return fmt.Errorf("%w (and telling the sender: %w)", err, werr)
	}
	linger := time.NewTimer(lingerFor)
	defer linger.Stop()
	select {
	case <-s.readDone:
	case <-linger.C:
	case <-ctx.Done():
	}
	return err
}

func (s *receiveShell) greet(ctx context.Context) error {
	t, body, err := readMessage(s.r)
	if err != nil {
		return s.explain(err)
	}
	if t != msgHello {
		return s.refuse(refusalf("message %d instead of a hello", t))
	}
	h, err := parseHello(body)
	if err != nil {
		return s.refuse(err)
	}
	if s.sink, err = s.open(ctx, h); err != nil {
		return s.refuse(err)
	}
	if err := s.sink.Sync(); err != nil {
		return s.refuse(err)
	}
	c := s.sink.Cursor()
	s.core.at = c
	if err := s.w.write(encodeWelcome(c, s.sink.Progress().Get().Durable)); err != nil {
		return err
	}
	close(s.ready)
	if k, ok := s.sink.(CallSink); ok {
		s.calls.handle = k.Handle
		k.Connected(s.calls)
	}
	return nil
}

func refusalf(format string, args ...any) *Refused {
	return &Refused{Code: CodeCorrupt, Text: fmt.Sprintf(format, args...)}
}

// read takes frames from the connection to the queue.
func (s *receiveShell) read(ctx context.Context) error {
	defer close(s.readDone)
	if err := s.greet(ctx); err != nil {
		return err
	}
	err := s.readFrames(ctx)
	// What came whole before the connection broke is worth appending.
	ctx, cancel := context.WithTimeout(ctx, lingerFor)
	defer cancel()
	if failed := s.queue.end(ctx); failed != nil {
		return failed // the sender left because of it
	}
	return err
}

func (s *receiveShell) readFrames(ctx context.Context) error {
	for {
		t, body, err := readMessage(s.r)
		if err != nil {
			return s.explain(err)
		}
		switch t {
		case msgPing:
		case msgFrame:
			f, err := s.core.take(body)
			if err != nil {
				return s.refuse(err)
			}
			if f == nil {
				continue
			}
			if err := s.queue.put(ctx, f); err != nil {
				return err
			}
		case msgCall:
			if err := s.calls.called(ctx, body); err != nil {
				return s.explain(err)
			}
		case msgAnswer:
			if err := s.calls.answered(body); err != nil {
				return s.explain(err)
			}
		default:
			return s.refuse(refusalf("message %d out of turn", t))
		}
	}
}

// apply takes frames from the queue to the sink: while one group is appended,
// the next gathers.
func (s *receiveShell) apply(ctx context.Context) error {
	for {
		group, err := s.queue.take(ctx)
		if err != nil || len(group) == 0 {
			return err
		}
		if err := s.sink.Append(ctx, group); err != nil {
			return s.refuseBeside(ctx, err)
		}
		select {
		case s.appended <- struct{}{}:
		default:
		}
	}
}

// explain tells the sender about bytes that are no message; a connection that
// broke is told nothing.
func (s *receiveShell) explain(err error) error {
	if r := refusal(err); r.Code == CodeCorrupt || r.Code == CodeVersion {
		return s.refuse(err)
	}
	return err
}

// sync commits groups: while one fsync runs, the next frames gather.
func (s *receiveShell) sync(ctx context.Context) error {
	for {
		select {
		case <-s.appended:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if err := s.sink.Sync(); err != nil {
			return s.refuseBeside(ctx, err)
		}
	}
}

func (s *receiveShell) ack(ctx context.Context) error {
	select {
	case <-s.ready:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	p := s.sink.Progress()
	for last := (Ack{}); ; {
		ack, err := p.Wait(ctx, last)
		if err != nil {
			return err
		}
		if err := s.w.write(ack.encode()); err != nil {
			return err
		}
		last = ack
	}
}
