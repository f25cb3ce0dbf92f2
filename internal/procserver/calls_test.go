package procserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/dr"
	"farside/internal/link"
	"farside/internal/transport"
)

// answering is a target that answers calls.
type answering struct {
	*target
	handle link.Handler
}

func (a answering) Connected(*link.Caller) {}

func (a answering) Handle(ctx context.Context, k link.CallKind, b []byte) ([]byte, error) {
	return a.handle(ctx, k, b)
}

// relayed is a process server between an agent that calls and a master target that
// answers; off says whether that can be reached right now.
type relayed struct {
	*site
	srv    *server
	agent  *link.Caller
	mu     sync.Mutex
	off    bool
	cutWAN context.CancelFunc
}

func (r *relayed) setOff(off bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.off = off; off && r.cutWAN != nil {
		r.cutWAN()
	}
}

// relay runs until ctx ends; it returns when the stream has passed.
func relay(t *testing.T, ctx context.Context, wg *sync.WaitGroup, handle link.Handler) *relayed {
	t.Helper()
	r := &relayed{site: newSite(t)}
	sink := answering{r.target, handle}
	dial := func(ctx context.Context, _ route) (net.Conn, error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.off {
			return nil, fmt.Errorf("the WAN is cut: %w", dr.ErrUnavailable)
		}
		a, b := transport.Pipe(psPeer, mtPeer)
		ctx, r.cutWAN = context.WithCancel(ctx)
		wg.Go(func() {
			link.Receive(ctx, b, func(context.Context, link.Hello) (link.Sink, error) { return sink, nil })
		})
		return a, nil
	}
	r.srv = newServer(r.fs, "/spool", r.limit, dial, slog.New(slog.DiscardHandler))
	r.srv.assign(ctx, assignment())
	a := &agent{frames: frames(t, origin, 3)}
	called := make(chan *link.Caller, 1)
	connected := func(c *link.Caller) { called <- c }
	wg.Go(func() {
		for ctx.Err() == nil { // refused as long as the master target has said nothing
			left, right := transport.Pipe(agentPeer, psPeer)
			wg.Go(func() { r.srv.links.Serve(ctx, right) })
			hello := link.Hello{Machine: machine, Timeline: 1}
			link.Send(ctx, left, link.SenderOptions{Hello: hello, Source: a, Connected: connected})
			time.Sleep(time.Second)
		}
	})
	r.agent = <-called
	waitDurable(t, a)
	return r
}

// Comparisons pass through, errors keep their kind, and nothing else passes.
func TestCallsPassThrough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		r := relay(t, ctx, &wg, func(_ context.Context, k link.CallKind, b []byte) ([]byte, error) {
			if string(b) == "lag" {
				return nil, fmt.Errorf("not there yet: %w", dr.ErrUnavailable)
			}
			return fmt.Appendf(nil, "%d %s", k, b), nil
		})
		defer func() { cancel(); r.srv.close(); wg.Wait() }()
		if b, err := r.agent.Call(ctx, link.CallCompare, []byte("hashes")); string(b) != "1 hashes" || err != nil {
			t.Errorf("answer %q, %v", b, err)
		}
		if _, err := r.agent.Call(ctx, link.CallCompare, []byte("lag")); !errors.Is(err, dr.ErrUnavailable) {
			t.Errorf("lag: %v", err)
		}
		if _, err := r.agent.Call(ctx, link.CallBarrier, nil); !errors.Is(err, dr.ErrUnsupported) {
			t.Errorf("barrier: %v", err)
		}
	})
}

// While the master target is away, callers are told so, and hear from it again when
// it is back.
func TestCallsWithoutTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var r *relayed
		r = relay(t, ctx, &wg, func(ctx context.Context, _ link.CallKind, b []byte) ([]byte, error) {
			if string(b) == "wait" {
				go r.setOff(true) // in the middle of a call
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return b, nil
		})
		defer func() { cancel(); r.srv.close(); wg.Wait() }()
		for _, body := range []string{"wait", "hello"} {
			synctest.Wait() // until the target is off as a whole
			if _, err := r.agent.Call(ctx, link.CallCompare, []byte(body)); !errors.Is(err, dr.ErrUnavailable) {
				t.Errorf("%s without a target: %v", body, err)
			}
		}
		r.setOff(false)
		time.Sleep(2 * retryMax)
		if b, err := r.agent.Call(ctx, link.CallCompare, []byte("hello")); string(b) != "hello" || err != nil {
			t.Errorf("with the target again: %q, %v", b, err)
		}
	})
}
