package procserver

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
)

// fakeAgent is a member that keeps to the rules of a barrier: it answers TAG only if
// it was frozen since HOLD, and thaws by itself.
type fakeAgent struct {
	mu      sync.Mutex
	delay   map[pb.BarrierPhase]time.Duration // of each call
	fail    pb.BarrierPhase                   // answers that with an error
	silent  pb.BarrierPhase                   // never answers that
	frozen  bool
	thaw    *time.Timer
	since   time.Time
	tags    []span // intervals in which it was frozen and whose state it tagged
	revoked bool
}

// span is when an agent was frozen.
type span struct{ from, to time.Time }

var errFake = errors.New("made to fail")

func (f *fakeAgent) call(ctx context.Context, c *pb.BarrierCall) (*pb.BarrierAnswer, error) {
	select {
	case <-time.After(f.delay[c.GetPhase()]):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if c.GetPhase() == f.silent {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if c.GetPhase() == f.fail {
		return nil, errFake
	}
	switch c.GetPhase() {
	case pb.BarrierPhase_BARRIER_PHASE_HOLD:
		f.frozen, f.since = true, time.Now()
		f.thaw = time.AfterFunc(time.Duration(c.GetLimitMs())*time.Millisecond, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.frozen = false
		})
	case pb.BarrierPhase_BARRIER_PHASE_TAG:
		if !f.frozen {
			return nil, errors.New("thawed by itself")
		}
		f.thaw.Stop()
		f.frozen = false
		f.tags = append(f.tags, span{f.since, time.Now()})
		return &pb.BarrierAnswer{Position: &pb.Position{Timeline: 1, Seq: 7}, Consistency: c.GetConsistency(), HeldMs: 1000 * time.Since(f.since).Seconds()}, nil
	case pb.BarrierPhase_BARRIER_PHASE_ABORT:
		f.frozen, f.revoked = false, true
	}
	return &pb.BarrierAnswer{}, nil
}

func barrierOf(hold time.Duration, agents ...*fakeAgent) *barrier {
	b := &barrier{
		id: [16]byte{1}, name: "n", consistency: pb.Consistency_CONSISTENCY_FILESYSTEM, prepare: time.Minute, hold: hold,
		members: map[dr.MachineID]member{},
	}
	for i, a := range agents {
		b.members[dr.MachineID{byte(i + 1)}] = a.call
	}
	return b
}

// common is a moment at which all agents were frozen in their newest tagged span.
func common(agents []*fakeAgent) bool {
	var from, to time.Time
	for i, a := range agents {
		if len(a.tags) == 0 {
			return false
		}
		s := a.tags[len(a.tags)-1]
		if i == 0 || s.from.After(from) {
			from = s.from
		}
		if i == 0 || s.to.Before(to) {
			to = s.to
		}
	}
	return !to.Before(from)
}

// Whatever the delays, failures and silences: if a barrier succeeds, there was a
// moment at which all were frozen; if it fails, who could be reached has withdrawn its tag and
// nothing stays frozen longer than the limit.
func TestBarrier(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	succeeded, failed := 0, 0
	for range 400 {
		synctest.Test(t, func(t *testing.T) {
			const hold = 300 * time.Millisecond
			var agents []*fakeAgent
			for range 1 + rng.IntN(5) {
				a := &fakeAgent{delay: map[pb.BarrierPhase]time.Duration{
					pb.BarrierPhase_BARRIER_PHASE_PREPARE: time.Duration(rng.IntN(3000)) * time.Millisecond,
					pb.BarrierPhase_BARRIER_PHASE_HOLD:    time.Duration(rng.IntN(220)) * time.Millisecond,
					pb.BarrierPhase_BARRIER_PHASE_TAG:     time.Duration(rng.IntN(150)) * time.Millisecond,
					pb.BarrierPhase_BARRIER_PHASE_ABORT:   time.Duration(rng.IntN(100)) * time.Millisecond,
				}}
				if rng.IntN(12) == 0 {
					a.fail = pb.BarrierPhase(1 + rng.IntN(3))
				}
				if rng.IntN(12) == 0 {
					a.silent = pb.BarrierPhase(1 + rng.IntN(3))
				}
				agents = append(agents, a)
			}
			got, err := barrierOf(hold, agents...).run(t.Context())
			if err == nil {
				succeeded++
				if !common(agents) || len(got.at) != len(agents) || got.held > hold {
					t.Errorf("succeeded without a common moment: %+v", got)
				}
				return
			}
			failed++
			time.Sleep(hold + time.Millisecond)
			for i, a := range agents {
				a.mu.Lock()
				if a.frozen || !a.revoked {
					t.Errorf("agent %d after %v: frozen %v, told to abort %v", i, err, a.frozen, a.revoked)
				}
				a.mu.Unlock()
			}
		})
	}
	if succeeded < 50 || failed < 50 {
		t.Errorf("%d succeeded and %d failed: this test lost its power", succeeded, failed)
	}
}

// An agent that is not asked to hold tags at its own time: then there often is no
// common moment. This is what the barrier is for.
func TestNoBarrier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var agents []*fakeAgent
		for i := range 3 {
			a := &fakeAgent{delay: map[pb.BarrierPhase]time.Duration{pb.BarrierPhase_BARRIER_PHASE_HOLD: time.Duration(i) * 100 * time.Millisecond}}
			for _, p := range []pb.BarrierPhase{pb.BarrierPhase_BARRIER_PHASE_HOLD, pb.BarrierPhase_BARRIER_PHASE_TAG} {
				if _, err := a.call(t.Context(), &pb.BarrierCall{Phase: p, LimitMs: 300}); err != nil {
					t.Fatal(err)
				}
			}
			agents = append(agents, a)
		}
		if common(agents) {
			t.Error("a common moment without a barrier")
		}
	})
}

func TestBarrierSaysWhoFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bad := &fakeAgent{fail: pb.BarrierPhase_BARRIER_PHASE_HOLD}
		_, err := barrierOf(time.Second, &fakeAgent{}, bad).run(t.Context())
		if !errors.Is(err, errFake) || !strings.Contains(err.Error(), "hold: machine 02000000") {
			t.Errorf("error %v", err)
		}
		slow := &fakeAgent{silent: pb.BarrierPhase_BARRIER_PHASE_TAG}
		began := time.Now()
		if _, err = barrierOf(time.Second, slow).run(t.Context()); !strings.Contains(err.Error(), "within 1s") {
			t.Errorf("error %v", err)
		}
		if d := time.Since(began); d > 1500*time.Millisecond {
			t.Errorf("took %v", d)
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		gone := &fakeAgent{silent: pb.BarrierPhase_BARRIER_PHASE_PREPARE}
		if _, err = barrierOf(time.Second, gone).run(ctx); !errors.Is(err, context.Canceled) || !gone.revoked {
			t.Errorf("given up: %v", err)
		}
	})
}
