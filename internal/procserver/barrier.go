package procserver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/link"
)

// member calls one agent of a group.
type member func(ctx context.Context, call *pb.BarrierCall) (*pb.BarrierAnswer, error)

// barrier tags machines at one instant: there is a moment T at which all of them
// are frozen, and each one's tag marks its state at T.
//
//	PREPARE to all ── all ready ──► HOLD to all ── all frozen: T ──► TAG to all ──► done
//	   │ one fails                    │ one fails, or the limit passes  │ one fails
//	   └──────────────────────────────┴─────────────────────────────────┴──► ABORT to all
//
// An agent answers TAG only if it was frozen all the time since its HOLD, which it
// answered before T; so its tag holds what it had at T, and no effect of what another
// machine did after its own tag. An agent thaws after TAG, after ABORT, and by itself
// when the limit of HOLD passes. Each barrier has an id of its own, so a tag that an
// unreachable agent could not withdraw never completes another one's.
type barrier struct {
	id          [16]byte
	name        string
	consistency pb.Consistency
	prepare     time.Duration // limit of the preparation
	hold        time.Duration // limit of holding, from the first call to the last tag
	members     map[dr.MachineID]member
}

// abortWithin bounds the calls that end a failed barrier. Whoever can't be reached
// thaws by itself.
const abortWithin = 2 * time.Second

// tagged is what a barrier came to.
type tagged struct {
	at          map[dr.MachineID]dr.Position
	consistency pb.Consistency // the weakest that a member reached
	held        time.Duration  // longest time that a member was frozen
	detail      string         // what did not go as wanted, though it went
}

// run does it. An error names the machine that failed first; nothing is tagged then.
func (b *barrier) run(ctx context.Context) (tagged, error) {
	t, err := b.try(ctx)
	if err == nil {
		return t, nil
	}
	// Not under ctx: also who gives up must thaw.
	short, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortWithin)
	defer cancel()
	_, aborted := b.all(short, pb.BarrierPhase_BARRIER_PHASE_ABORT, 0, false)
	return tagged{}, errors.Join(err, aborted)
}

func (b *barrier) try(ctx context.Context) (tagged, error) {
	ready, cancel := limited(ctx, b.prepare, "prepared")
	defer cancel()
	if _, err := b.all(ready, pb.BarrierPhase_BARRIER_PHASE_PREPARE, b.prepare, true); err != nil {
		return tagged{}, err
	}
	held, cancel := limited(ctx, b.hold, "held and tagged")
	defer cancel()
	if _, err := b.all(held, pb.BarrierPhase_BARRIER_PHASE_HOLD, b.hold, true); err != nil {
		return tagged{}, err
	}
	answers, err := b.all(held, pb.BarrierPhase_BARRIER_PHASE_TAG, b.hold, true)
	if err != nil {
		return tagged{}, err
	}
	return gather(answers), nil
}

func limited(ctx context.Context, limit time.Duration, what string) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("the machines could not be %s within %v: %w", what, limit, dr.ErrUnavailable))
}

// all calls all members at once. If first, the first that fails ends the rest, and
// only its error counts.
func (b *barrier) all(ctx context.Context, phase pb.BarrierPhase, limit time.Duration, first bool) (map[dr.MachineID]*pb.BarrierAnswer, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	answers := make(map[dr.MachineID]*pb.BarrierAnswer, len(b.members))
	var errs []error
	for id, m := range b.members {
		wg.Go(func() {
			a, err := m(ctx, b.call(phase, limit))
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				answers[id] = a
				return
			}
			if cause := context.Cause(ctx); errors.Is(err, context.DeadlineExceeded) && cause != nil {
				err = cause
			}
			if len(errs) == 0 || !first {
				errs = append(errs, fmt.Errorf("%s: machine %v: %w", phaseName(phase), id, err))
			}
			if first {
				cancel()
			}
		})
	}
	wg.Wait()
	return answers, errors.Join(errs...)
}

func (b *barrier) call(phase pb.BarrierPhase, limit time.Duration) *pb.BarrierCall {
	return &pb.BarrierCall{
		Id: dr.NodeID(b.id).String(), Phase: phase, Name: b.name, Consistency: b.consistency,
		LimitMs: limit.Milliseconds(), HoldLimitMs: b.hold.Milliseconds(),
	}
}

func phaseName(p pb.BarrierPhase) string {
	return strings.ToLower(strings.TrimPrefix(p.String(), "BARRIER_PHASE_"))
}

func gather(answers map[dr.MachineID]*pb.BarrierAnswer) tagged {
	t := tagged{at: map[dr.MachineID]dr.Position{}, consistency: pb.Consistency_CONSISTENCY_APPLICATION}
	var details []string
	for id, a := range answers {
		t.at[id] = dr.Position{Timeline: dr.Timeline(a.GetPosition().GetTimeline()), Seq: dr.Seq(a.GetPosition().GetSeq())}
		t.consistency = min(t.consistency, a.GetConsistency())
		t.held = max(t.held, time.Duration(a.GetHeldMs()*float64(time.Millisecond)))
		if a.GetDetail() != "" {
			details = append(details, fmt.Sprintf("machine %v: %s", id, a.GetDetail()))
		}
	}
	slices.Sort(details)
	t.detail = strings.Join(details, "; ")
	return t
}

// memberOf calls the agent of a stream over the link that stands.
func memberOf(s *stream) member {
	return func(ctx context.Context, call *pb.BarrierCall) (*pb.BarrierAnswer, error) {
		s.mu.Lock()
		c := s.mu.agent
		s.mu.Unlock()
		if c == nil {
			return nil, fmt.Errorf("its agent is not connected: %w", dr.ErrUnavailable)
		}
		body, err := proto.Marshal(call)
		if err != nil {
			return nil, fmt.Errorf("marshal barrier call: %w", err)
		}
		b, err := c.Call(ctx, link.CallBarrier, body)
		if err != nil {
			return nil, err
		}
		a := &pb.BarrierAnswer{}
		if err := proto.Unmarshal(b, a); err != nil {
			return nil, fmt.Errorf("answer of its agent: %w: %w", dr.ErrCorrupt, err)
		}
		return a, nil
	}
}
