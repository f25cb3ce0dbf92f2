package link

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/dr"
)

// callSink is a memSink that takes part in calls.
type callSink struct {
	*memSink
	handle    Handler
	connected func(*Caller)
}

func (s callSink) Connected(c *Caller) { s.connected(c) }

func (s callSink) Handle(ctx context.Context, kind CallKind, body []byte) ([]byte, error) {
	return s.handle(ctx, kind, body)
}

// both is a link whose sides can call each other.
type both struct {
	sender, receiver *Caller // who calls
	cancel           context.CancelFunc
	ended            chan error
	sink             *memSink
	src              *list
	ready            sync.WaitGroup
}

// dial raises a link in a synctest bubble; answering are the handlers.
func dial(t *testing.T, n int, ofSender, ofReceiver Handler) *both {
	t.Helper()
	l := &both{sink: newMemSink(), src: newList(frames(t, origin, n)), ended: make(chan error, 2)}
	ctx, cancel := context.WithCancel(t.Context())
	l.cancel = cancel
	a, b := pipe()
	l.ready.Add(2)
	sink := callSink{l.sink, ofReceiver, func(c *Caller) { l.receiver = c; l.ready.Done() }}
	go func() {
		l.ended <- Receive(ctx, b, func(context.Context, Hello) (Sink, error) { return sink, nil })
	}()
	go func() {
		l.ended <- Send(ctx, a, SenderOptions{
			Hello: hello, Source: l.src, Handle: ofSender,
			Connected: func(c *Caller) { l.sender = c; l.ready.Done() },
		})
	}()
	l.ready.Wait()
	return l
}

func (l *both) end() {
	l.cancel()
	<-l.ended
	<-l.ended
}

func echo(_ context.Context, kind CallKind, body []byte) ([]byte, error) {
	return append([]byte{byte(kind)}, body...), nil
}

// Calls go both ways, many at a time, beside the frames.
func TestCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := dial(t, 200, echo, echo)
		var wg sync.WaitGroup
		for i := range 100 {
			for _, c := range []*Caller{l.sender, l.receiver} {
				wg.Go(func() {
					want := bytes.Repeat([]byte{byte(i)}, i*1000)
					got, err := c.Call(t.Context(), CallKind(i%3), want)
					if err != nil || !bytes.Equal(got[1:], want) || got[0] != byte(i%3) {
						t.Errorf("call %d: %d bytes, %v", i, len(got), err)
					}
				})
			}
		}
		wg.Wait()
		<-l.src.done
		l.end()
		checkAll(t, l.sink, l.src.frames)
		if _, err := l.sender.Call(t.Context(), CallCompare, nil); !errors.Is(err, dr.ErrUnavailable) {
			t.Errorf("call after the end: %v", err)
		}
	})
}

// The kind of an error travels, and bounds hold.
func TestCallErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fails := func(_ context.Context, kind CallKind, body []byte) ([]byte, error) {
			if kind == CallBarrier {
				return make([]byte, MaxCall+1), nil
			}
			for _, k := range kinds {
				if k.Error() == string(body) {
					return nil, fmt.Errorf("asked for: %w", k)
				}
			}
			return nil, errors.New("something else")
		}
		l := dial(t, 1, nil, fails)
		defer l.end()
		for _, want := range kinds {
			if _, err := l.sender.Call(t.Context(), CallCompare, []byte(want.Error())); !errors.Is(err, want) {
				t.Errorf("%v came as %v", want, err)
			}
		}
		for _, c := range []struct {
			from *Caller
			kind CallKind
			body []byte
			want error
		}{
			{l.sender, CallCompare, nil, dr.ErrUnavailable},
			{l.sender, CallBarrier, nil, dr.ErrInvalid},
			{l.sender, CallCompare, make([]byte, MaxCall+1), dr.ErrInvalid},
			{l.receiver, CallCompare, nil, dr.ErrUnsupported}, // the sender handles none
		} {
			if _, err := c.from.Call(t.Context(), c.kind, c.body); !errors.Is(err, c.want) {
				t.Errorf("kind %d, %d bytes: %v, want %v", c.kind, len(c.body), err, c.want)
			}
		}
	})
}

// A caller that leaves keeps its place until the answer comes; one more than the
// bound waits; what is served ends with the link.
func TestCallsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free := make(chan struct{})
		served := 0
		var mu sync.Mutex
		slow := func(ctx context.Context, _ CallKind, _ []byte) ([]byte, error) {
			mu.Lock()
			served++
			mu.Unlock()
			select {
			case <-free:
				return nil, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		l := dial(t, 1, slow, nil)
		count := func() int { mu.Lock(); defer mu.Unlock(); return served }
		for range maxCalls {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if _, err := l.receiver.Call(ctx, CallBarrier, nil); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("abandoned call: %v", err)
			}
			cancel()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if _, err := l.receiver.Call(ctx, CallBarrier, nil); !errors.Is(err, context.DeadlineExceeded) || count() != maxCalls {
			t.Fatalf("one too many: %v, %d served", err, count())
		}
		cancel()
		close(free)
		if _, err := l.receiver.Call(t.Context(), CallBarrier, nil); err != nil || count() != maxCalls+1 {
			t.Fatalf("after the answers: %v, %d served", err, count())
		}
		l.end()
	})
}

// Whoever does not keep to the protocol of calls loses the connection.
func TestCallsOutOfTurn(t *testing.T) {
	many := func(n int) (out [][]byte) {
		for i := range n {
			out = append(out, bytes.Join(encodeCall(uint32(i), CallBarrier, nil), nil))
		}
		return out
	}
	for name, bodies := range map[string][][]byte{
		"an answer to nothing": {bytes.Join(encodeAnswer(7, answer{}), nil)},
		"too many calls":       many(maxCalls + 1),
		"reserved bytes":       {message(msgCall, []byte{1, 0, 0, 0, 1, 0, 1, 0})},
		"an unknown code":      {message(msgAnswer, []byte{1, 0, 0, 0, 99, 0, 0, 0})},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				a, b := pipe()
				stuck := func(ctx context.Context, _ CallKind, _ []byte) ([]byte, error) { <-ctx.Done(); return nil, ctx.Err() }
				sink := callSink{newMemSink(), stuck, func(*Caller) {}}
				ended := make(chan error, 1)
				go func() { ended <- Receive(ctx, b, func(context.Context, Hello) (Sink, error) { return sink, nil }) }()
				go func(conn net.Conn) {
					_, _ = conn.Write(hello.encode())
					for _, m := range bodies {
						_, _ = conn.Write(m)
					}
				}(a)
				go func() {
					for {
						if _, _, err := readMessage(a); err != nil {
							return
						}
					}
				}()
				if err := <-ended; !errors.Is(err, dr.ErrCorrupt) {
					t.Errorf("ended with %v", err)
				}
				a.Close()
			})
		})
	}
}

// No bytes make the parsers panic or read past what is there.
func FuzzCalls(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 1, 0, 0, 0, 'x'})
	f.Add([]byte{1, 0, 0, 0, 5, 0, 0, 0, 'e'})
	f.Fuzz(func(t *testing.T, b []byte) {
		if id, kind, arg, err := parseCall(b); err == nil {
			if got := bytes.Join(encodeCall(id, kind, arg), nil)[headerSize:]; !bytes.Equal(got, b) {
				t.Errorf("%x came back as %x", b, got)
			}
		}
		if id, a, err := parseAnswer(b); err == nil && a.err == nil {
			if got := bytes.Join(encodeAnswer(id, a), nil)[headerSize:]; !bytes.Equal(got, b) {
				t.Errorf("%x came back as %x", b, got)
			}
		}
	})
}
