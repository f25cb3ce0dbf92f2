package link

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"farside/internal/dr"
)

// CallKind says what a call is about.
type CallKind uint16

// The kinds of call.
const (
	CallCompare CallKind = iota + 1 // do these blocks differ? docs/format/compare.md
	CallBarrier                     // hold, tag and release a machine with others of its group
)

// MaxCall bounds the body of a call and of its answer, in bytes.
const MaxCall = 1 << 20

// maxCalls bounds the calls of one side that were not answered yet.
const maxCalls = 16

// Handler answers the calls of the other side; several may run at once. The
// kind of its error travels: the caller's error wraps the same dr kind.
type Handler func(ctx context.Context, kind CallKind, body []byte) ([]byte, error)

// CallSink is a Sink that takes part in calls.
type CallSink interface {
	Sink
	// Connected is called once, before the first frame: c calls the sender.
	Connected(c *Caller)
	// Handle is the Handler of the sender's calls.
	Handle(ctx context.Context, kind CallKind, body []byte) ([]byte, error)
}

// Caller calls the other side of a link. It is safe for concurrent use; after
// the link's end each call fails with dr.ErrUnavailable.
type Caller struct {
	w      *writer
	handle Handler       // nil: calls are refused
	room   chan struct{} // has a token for each call that may be made
	over   chan struct{} // closed at the end of the link
	serves sync.WaitGroup

	mu struct {
		sync.Mutex
		next    uint32
		waiting map[uint32]chan answer // one slot each
		serving int
		over    bool
	}
}

// answer is what a call was answered with.
type answer struct {
	body []byte
	err  error
}

func newCaller(w *writer, h Handler) *Caller {
	c := &Caller{w: w, handle: h, room: make(chan struct{}, maxCalls), over: make(chan struct{})}
	c.mu.waiting = map[uint32]chan answer{}
	return c
}

// errOver is the error of calls whose link has ended.
var errOver = fmt.Errorf("the link ended: %w", dr.ErrUnavailable)

// Call sends body, at most MaxCall bytes, and waits for the answer. An error of
// the other side is a *Refused; dr.ErrUnavailable means that the link ended.
func (c *Caller) Call(ctx context.Context, kind CallKind, body []byte) ([]byte, error) {
	a, err := c.call(ctx, kind, body)
	if err != nil {
		return nil, fmt.Errorf("call the other side: %w", err)
	}
	return a, nil
}

func (c *Caller) call(ctx context.Context, kind CallKind, body []byte) ([]byte, error) {
	if len(body) > MaxCall {
		return nil, fmt.Errorf("%d bytes: %w", len(body), dr.ErrInvalid)
	}
	select {
	case c.room <- struct{}{}:
	case <-c.over:
		return nil, errOver
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	id, wait := c.register()
	if err := c.w.write(encodeCall(id, kind, body)...); err != nil {
		return nil, fmt.Errorf("%w: %w", errOver, err) // the room is of no use to anyone any more
	}
	select {
	case a := <-wait:
		return a.body, a.err
	case <-c.over:
		return nil, errOver
	case <-ctx.Done():
		return nil, ctx.Err() // the room is free again when the answer comes
	}
}

func (c *Caller) register() (uint32, chan answer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.next++
	wait := make(chan answer, 1)
	c.mu.waiting[c.mu.next] = wait
	return c.mu.next, wait
}

// answered takes an answer of the other side.
func (c *Caller) answered(body []byte) error {
	id, a, err := parseAnswer(body)
	if err != nil {
		return err
	}
	c.mu.Lock()
	wait := c.mu.waiting[id]
	delete(c.mu.waiting, id)
	c.mu.Unlock()
	if wait == nil {
		return fmt.Errorf("answer to call %d, which waits for none: %w", id, dr.ErrCorrupt)
	}
	wait <- a
	<-c.room
	return nil
}

// called takes a call of the other side and serves it beside what else goes on.
func (c *Caller) called(ctx context.Context, body []byte) error {
	id, kind, arg, err := parseCall(body)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.mu.over:
		return errOver
	case c.mu.serving >= maxCalls:
		return fmt.Errorf("more than %d calls at a time: %w", maxCalls, dr.ErrCorrupt)
	}
	c.mu.serving++
	c.serves.Go(func() { c.serve(ctx, id, kind, arg) })
	return nil
}

func (c *Caller) serve(ctx context.Context, id uint32, kind CallKind, arg []byte) {
	var a answer
	if c.handle == nil {
		a.err = fmt.Errorf("no calls are answered here: %w", dr.ErrUnsupported)
	} else {
		a.body, a.err = c.handle(ctx, kind, arg)
	}
	if a.err == nil && len(a.body) > MaxCall {
		a = answer{err: fmt.Errorf("the answer has %d bytes: %w", len(a.body), dr.ErrInvalid)}
	}
	c.mu.Lock()
	c.mu.serving-- // before the answer: the other side may call again as soon as it has it
	c.mu.Unlock()
	_ = c.w.write(encodeAnswer(id, a)...) // if it fails, the link has ended
}

// keep ends the calls when ctx ends, and waits for those that are being served.
func (c *Caller) keep(ctx context.Context) error {
	<-ctx.Done()
	c.mu.Lock()
	c.mu.over = true
	c.mu.Unlock()
	close(c.over)
	c.serves.Wait()
	return nil
}

const (
	callFixed   = 8
	answerFixed = 8
)

func encodeCall(id uint32, kind CallKind, arg []byte) [][]byte {
	b := make([]byte, headerSize+callFixed)
	putHeader(b, msgCall, callFixed+len(arg))
	le.PutUint32(b[headerSize:], id)
	le.PutUint16(b[headerSize+4:], uint16(kind))
	return [][]byte{b, arg}
}

func parseCall(b []byte) (id uint32, kind CallKind, arg []byte, err error) {
	if len(b) < callFixed || b[6]|b[7] != 0 {
		return 0, 0, nil, fmt.Errorf("call of %d bytes: %w", len(b), dr.ErrCorrupt)
	}
	return le.Uint32(b), CallKind(le.Uint16(b[4:])), b[callFixed:], nil
}

func encodeAnswer(id uint32, a answer) [][]byte {
	body, code := a.body, Code(0)
	if a.err != nil {
		r := refuse(a.err, ofCalls)
		body, code = []byte(r.Text), r.Code
	}
	b := make([]byte, headerSize+answerFixed)
	putHeader(b, msgAnswer, answerFixed+len(body))
	le.PutUint32(b[headerSize:], id)
	le.PutUint16(b[headerSize+4:], uint16(code))
	return [][]byte{b, body}
}

func parseAnswer(b []byte) (id uint32, a answer, err error) {
	if len(b) < answerFixed || b[6]|b[7] != 0 {
		return 0, a, fmt.Errorf("answer of %d bytes: %w", len(b), dr.ErrCorrupt)
	}
	id, code, rest := le.Uint32(b), Code(le.Uint16(b[4:])), b[answerFixed:]
	switch {
	case code == 0:
		return id, answer{body: rest}, nil
	case kinds[code] == nil || len(rest) > maxText:
		return 0, a, fmt.Errorf("answer with code %d and %d bytes: %w", code, len(rest), dr.ErrCorrupt)
	}
	return id, answer{err: &Refused{Code: code, Text: strings.ToValidUTF8(string(rest), "?")}}, nil
}
