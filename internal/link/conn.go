package link

import (
	"bufio"
	"context"
	"net"
	"sync"
	"time"
)

const (
	pingEvery   = 5 * time.Second
	deadAfter   = 20 * time.Second
	lingerFor   = time.Second // after a refusal, for the sender to read it
	readBuffer  = 32 << 10    // larger bodies bypass it
	writeBuffer = 64 << 10    // header and body leave in one piece
	groupBytes  = 8 << 20     // frames handed to a sink at once
	groupFrames = 256
)

// writer lets several goroutines write whole messages to a connection. Whose turn it is may
// last as long as the connection is slow, so a channel says it: under a simulated clock nobody may wait
// for a mutex that long.
type writer struct {
	turn  chan struct{} // holds one value while it is somebody's
	buf   *bufio.Writer
	wrote bool // since the last tick of keepAlive
}

func newWriter(conn net.Conn) *writer {
	return &writer{turn: make(chan struct{}, 1), buf: bufio.NewWriterSize(conn, writeBuffer)}
}

// take makes it the caller's turn until done is called.
func (w *writer) take() (done func()) {
	w.turn <- struct{}{}
	return func() { <-w.turn }
}

// write sends one message, given as its header and body or in one piece.
func (w *writer) write(parts ...[]byte) error {
	defer w.take()()
	if err := w.putInTurn(parts); err != nil {
		return err
	}
	return w.buf.Flush()
}

// put is write, but small messages may wait for the next write or flush.
func (w *writer) put(parts ...[]byte) error {
	defer w.take()()
	return w.putInTurn(parts)
}

func (w *writer) flush() error {
	defer w.take()()
	return w.buf.Flush()
}

func (w *writer) putInTurn(parts [][]byte) error {
	w.wrote = true
	for _, p := range parts {
		if _, err := w.buf.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// keepAlive shows life while nothing else is sent, until ctx ends.
func (w *writer) keepAlive(ctx context.Context) error {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		select {
		case w.turn <- struct{}{}:
		default:
			continue // somebody writes, so what the other side reads is life enough
		}
		idle := !w.wrote
		w.wrote = false
		<-w.turn
		if !idle {
			continue
		}
		if err := w.write(message(msgPing, nil)); err != nil {
			return err
		}
	}
}

// liveReader fails when nothing arrives for deadAfter.
type liveReader struct{ net.Conn }

func (r liveReader) Read(p []byte) (int, error) {
	if err := r.SetReadDeadline(time.Now().Add(deadAfter)); err != nil {
		return 0, err
	}
	return r.Conn.Read(p)
}

// run runs the parts of one side until the first returns, closes the
// connection so that all return, and gives the first error. ctx ending is an
// error as well.
func run(ctx context.Context, conn net.Conn, parts ...func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	var wg sync.WaitGroup
	for _, part := range parts {
		wg.Go(func() {
			if err := part(ctx); err != nil {
				cancel(err) // only the first counts
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}
