package link

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"sync"

	"farside/internal/dr"
	"farside/internal/frame"
)

// Source gives the frames of a stream. Its methods are called by one goroutine
// each, but Acked may run at the same time as Next.
type Source interface {
	// Resume is called once, before Next: the next frame must continue at.
	// durable is what the receiver knows to be durable on the far side. When the
	// source can't continue there, its error (dr.ErrGap) ends Send.
	Resume(at frame.Cursor, durable dr.Seq) error
	// Next waits for the next frame and returns its bytes, which must not
	// change any more.
	Next(ctx context.Context) ([]byte, error)
	// Acked is told how far the receiver has come, also right after Resume.
	Acked(a Ack)
}

// ReadySource is a Source that knows whether Next would return a frame at once.
// Then small frames leave together.
type ReadySource interface {
	Source
	Ready() bool
}

// SenderOptions describe a stream to Send.
type SenderOptions struct {
	Hello
	Source Source
	Window int64 // bytes sent and not yet stored; 0 means 64 MiB

	Connected func(*Caller) // if set, called once the receiver has welcomed: it calls the receiver
	Handle    Handler       // of the receiver's calls; nil: they are refused
}

const defaultWindow = 64 << 20

// Send introduces the stream to the receiver at conn and sends its frames until
// ctx ends or something breaks; it always returns an error and closes conn. A
// refusal is a *Refused.
func Send(ctx context.Context, conn net.Conn, o SenderOptions) error {
	if o.Window == 0 {
		o.Window = defaultWindow
	}
	s := &sendShell{
		o: o, w: newWriter(conn), r: bufio.NewReaderSize(liveReader{conn}, readBuffer),
		room: make(chan struct{}, 1), welcomed: make(chan struct{}),
	}
	s.calls = newCaller(s.w, o.Handle)
	s.mu.core.machine = o.Machine
	return fmt.Errorf("send stream of %v: %w", o.Machine, run(ctx, conn, s.read, s.write, s.calls.keep, s.w.keepAlive))
}

type sendShell struct {
	o        SenderOptions
	w        *writer
	r        *bufio.Reader
	calls    *Caller
	room     chan struct{} // has a token after an ack
	welcomed chan struct{} // closed when the source has resumed

	mu struct {
		sync.Mutex
		core     sender
		inFlight []sentFrame // oldest first
		bytes    int64       // of them
	}
}

type sentFrame struct {
	last dr.Seq
	size int64
}

func (s *sendShell) read(ctx context.Context) error {
	for {
		t, body, err := readMessage(s.r)
		if err != nil {
			return err
		}
		if called, err := s.called(ctx, t, body); called || err != nil {
			if err != nil {
				return err
			}
			continue
		}
		s.mu.Lock()
		welcome, acked, err := s.mu.core.receive(t, body)
		ack := s.mu.core.ack
		for len(s.mu.inFlight) > 0 && s.mu.inFlight[0].last <= ack.Stored {
			s.mu.bytes -= s.mu.inFlight[0].size
			s.mu.inFlight = s.mu.inFlight[1:]
		}
		s.mu.Unlock()
		if err != nil {
			return err
		}
		if welcome != nil {
			if err := s.o.Source.Resume(*welcome, ack.Durable); err != nil {
				return err
			}
			close(s.welcomed)
			if s.o.Connected != nil {
				s.o.Connected(s.calls)
			}
		}
		if acked {
			s.o.Source.Acked(ack)
			select {
			case s.room <- struct{}{}:
			default:
			}
		}
	}
}

// called takes what belongs to a call; ok is false for any other message.
func (s *sendShell) called(ctx context.Context, t msgType, body []byte) (ok bool, err error) {
	switch {
	case t != msgCall && t != msgAnswer:
		return false, nil
	case !s.isWelcome():
		return true, fmt.Errorf("link message %d out of turn: %w", t, dr.ErrCorrupt)
	case t == msgCall:
		return true, s.calls.called(ctx, body)
	}
	return true, s.calls.answered(body)
}

func (s *sendShell) isWelcome() bool {
	select {
	case <-s.welcomed:
		return true
	default:
		return false
	}
}

func (s *sendShell) write(ctx context.Context) error {
	if err := s.w.write(s.o.Hello.encode()); err != nil {
		return err
	}
	select {
	case <-s.welcomed:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	ready := func() bool { return false }
	if r, ok := s.o.Source.(ReadySource); ok {
		ready = r.Ready
	}
	head := make([]byte, headerSize)
	for {
		b, err := s.o.Source.Next(ctx)
		if err != nil {
			return err
		}
		if err := s.admit(ctx, b); err != nil {
			return err
		}
		putHeader(head, msgFrame, len(b))
		send := s.w.put
		if !ready() {
			send = s.w.write
		}
		if err := send(head, b); err != nil {
			return err
		}
	}
}

// admit waits until b fits into the window and notes that it is in flight. A
// frame alone always fits.
func (s *sendShell) admit(ctx context.Context, b []byte) error {
	h, err := frame.ParseHeader(b)
	if err != nil {
		return fmt.Errorf("source gave no frame: %w", err)
	}
	for {
		s.mu.Lock()
		if s.mu.bytes == 0 || s.mu.bytes+int64(len(b)) <= s.o.Window {
			err := s.mu.core.send(&h)
			s.mu.inFlight = append(s.mu.inFlight, sentFrame{h.Last, int64(len(b))})
			s.mu.bytes += int64(len(b))
			s.mu.Unlock()
			return err
		}
		s.mu.Unlock()
		if err := s.w.flush(); err != nil { // what is to be acknowledged must have left
			return err
		}
		select {
		case <-s.room:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
