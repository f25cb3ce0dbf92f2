package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/quiesce"
)

// standstill is a machine whose file systems are about to be frozen, or are.
type standstill interface {
	// Hold freezes them for at most limit.
	Hold(ctx context.Context, limit time.Duration) error
	// Held tells whether they were frozen all the time since Hold.
	Held() error
	// Release thaws them and lets the applications go on. It is called once.
	Release()
	// Reached is the consistency that a tag may claim while Held returns nil.
	Reached() dr.Consistency
}

// barriers takes part in the barriers that the process server leads for the
// machine's group: one at a time, each in a goroutine that ends with its Release,
// whatever becomes of the process server or the link.
//
//	          PREPARE            HOLD              TAG: tag while frozen
//	(none) ──────────► prepared ──────► holding ─────────────────────► (none), released
//	   ▲                  │ ABORT, another barrier, a limit │
//	   └──────────────────┴─────────────────────────────────┘ released
//
// ABORT also withdraws a tag that was placed.
type barriers struct {
	prepare func(ctx context.Context, c *pb.BarrierCall) (standstill, error)
	place   func(ctx context.Context, t dr.Tag) (dr.Position, error)

	rounds sync.WaitGroup
	mu     struct {
		sync.Mutex
		ctx   context.Context // of the stream; nil before run and after it
		round *round          // the newest
	}
}

// round is one barrier.
type round struct {
	id     [16]byte
	calls  chan roundCall
	cancel context.CancelCauseFunc
	over   chan struct{} // closed when everything is released

	placed bool // a tag; of the goroutine until over is closed
}

type roundCall struct {
	*pb.BarrierCall
	answer chan roundAnswer // one slot
}

type roundAnswer struct {
	*pb.BarrierAnswer
	err error
}

// Limits of what a process server may ask for.
const (
	maxPrepare = 5 * time.Minute
	maxHold    = 10 * time.Second
)

var (
	errAborted = fmt.Errorf("the process server ended the barrier: %w", dr.ErrUnavailable)
	errNext    = fmt.Errorf("another barrier began: %w", dr.ErrUnavailable)
	errNoRound = fmt.Errorf("no such barrier is under way: %w", dr.ErrNotFound)
)

// run lets barriers happen until ctx ends, and waits until nothing is held any more.
func (b *barriers) run(ctx context.Context) error {
	b.mu.Lock()
	b.mu.ctx = ctx
	b.mu.Unlock()
	<-ctx.Done()
	b.mu.Lock()
	b.mu.ctx = nil
	b.mu.Unlock()
	b.rounds.Wait()
	return ctx.Err()
}

// handle answers a call of kind barrier.
func (b *barriers) handle(ctx context.Context, body []byte) ([]byte, error) {
	c := &pb.BarrierCall{}
	if err := proto.Unmarshal(body, c); err != nil {
		return nil, fmt.Errorf("read barrier call: %w: %w", dr.ErrInvalid, err)
	}
	id, err := dr.ParseNodeID(c.GetId())
	if err != nil || id.IsZero() {
		return nil, fmt.Errorf("barrier with id %q: %w", c.GetId(), dr.ErrInvalid)
	}
	a, err := b.take(ctx, id, c)
	if err != nil {
		return nil, err
	}
	return proto.Marshal(a)
}

func (b *barriers) take(ctx context.Context, id [16]byte, c *pb.BarrierCall) (*pb.BarrierAnswer, error) {
	switch c.GetPhase() {
	case pb.BarrierPhase_BARRIER_PHASE_PREPARE:
		r, err := b.begin(ctx, id)
		if err != nil {
			return nil, err
		}
		return r.ask(ctx, c)
	case pb.BarrierPhase_BARRIER_PHASE_HOLD, pb.BarrierPhase_BARRIER_PHASE_TAG:
		if r := b.current(id); r != nil {
			return r.ask(ctx, c)
		}
		return nil, errNoRound
	case pb.BarrierPhase_BARRIER_PHASE_ABORT:
		return &pb.BarrierAnswer{}, b.abort(ctx, id)
	}
	return nil, fmt.Errorf("barrier phase %d: %w", c.GetPhase(), dr.ErrUnsupported)
}

// begin starts a round; the one before is ended first.
func (b *barriers) begin(ctx context.Context, id [16]byte) (*round, error) {
	if old := b.newest(); old != nil {
		old.cancel(errNext)
		select {
		case <-old.over:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mu.ctx == nil {
		return nil, fmt.Errorf("the stream is ending: %w", dr.ErrUnavailable)
	}
	own, cancel := context.WithCancelCause(b.mu.ctx)
	r := &round{id: id, calls: make(chan roundCall), cancel: cancel, over: make(chan struct{})}
	b.mu.round = r
	b.rounds.Go(func() {
		defer cancel(nil)
		defer close(r.over)
		b.keep(own, r)
	})
	return r, nil
}

func (b *barriers) newest() *round {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mu.round
}

func (b *barriers) current(id [16]byte) *round {
	if r := b.newest(); r != nil && r.id == id {
		return r
	}
	return nil
}

// abort ends a round and withdraws what it placed.
func (b *barriers) abort(ctx context.Context, id [16]byte) error {
	r := b.current(id)
	if r == nil {
		return nil // it never began here, or a later one has ended it
	}
	r.cancel(errAborted)
	select {
	case <-r.over:
	case <-ctx.Done():
		return ctx.Err()
	}
	if !r.placed {
		return nil
	}
	return b.revoke(ctx, r)
}

func (b *barriers) revoke(ctx context.Context, r *round) error {
	_, err := b.place(ctx, dr.Tag{ID: r.id, Group: r.id, Consistency: dr.Revoked})
	if err != nil {
		return fmt.Errorf("withdraw the tag: %w", err)
	}
	return nil
}

// ask hands a call to the round and waits for its answer.
func (r *round) ask(ctx context.Context, c *pb.BarrierCall) (*pb.BarrierAnswer, error) {
	call := roundCall{c, make(chan roundAnswer, 1)}
	select {
	case r.calls <- call:
	case <-r.over:
		return nil, errNoRound
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case a := <-call.answer:
		return a.BarrierAnswer, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// keep goes through a round.
func (b *barriers) keep(ctx context.Context, r *round) {
	call, err := r.next(ctx, pb.BarrierPhase_BARRIER_PHASE_PREPARE, maxPrepare)
	if err != nil {
		return
	}
	limit := bounded(call.GetLimitMs(), maxPrepare)
	short, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	still, err := b.prepare(short, call.BarrierCall)
	if err != nil {
		call.answer <- roundAnswer{err: causeOf(short, err)}
		return
	}
	defer still.Release()
	call.answer <- roundAnswer{BarrierAnswer: &pb.BarrierAnswer{}}
	if call, err = r.next(ctx, pb.BarrierPhase_BARRIER_PHASE_HOLD, limit); err != nil {
		return
	}
	hold := bounded(call.GetLimitMs(), maxHold)
	began := time.Now()
	err = still.Hold(ctx, hold)
	call.answer <- roundAnswer{BarrierAnswer: &pb.BarrierAnswer{}, err: err}
	if err != nil {
		return
	}
	if call, err = r.next(ctx, pb.BarrierPhase_BARRIER_PHASE_TAG, hold); err != nil {
		return
	}
	a, err := b.tag(ctx, r, call.BarrierCall, still, hold-time.Since(began))
	if err == nil {
		a.HeldMs = time.Since(began).Seconds() * 1000
	}
	call.answer <- roundAnswer{a, err}
}

// tag places the tag while everything is frozen. A tag that was placed, but of which
// nobody can say so, is withdrawn.
func (b *barriers) tag(ctx context.Context, r *round, c *pb.BarrierCall, still standstill, left time.Duration) (*pb.BarrierAnswer, error) {
	short, cancel := context.WithTimeout(ctx, left)
	defer cancel()
	if err := checkTagName(c.GetName()); err != nil {
		return nil, err
	}
	t := dr.Tag{ID: r.id, Group: r.id, Consistency: min(dr.Consistency(c.GetConsistency()), still.Reached()), Name: c.GetName()}
	p, err := b.place(short, t)
	if err != nil {
		return nil, fmt.Errorf("tag the stream: %w", causeOf(short, err))
	}
	r.placed = true
	if err := still.Held(); err != nil {
		return nil, errors.Join(fmt.Errorf("hold the file systems: %w", err), b.revoke(ctx, r))
	}
	return &pb.BarrierAnswer{
		Position: &pb.Position{Timeline: uint32(p.Timeline), Seq: uint64(p.Seq)}, Consistency: pb.Consistency(t.Consistency),
	}, nil
}

// next waits for the next call, which must be of a phase.
func (r *round) next(ctx context.Context, want pb.BarrierPhase, limit time.Duration) (roundCall, error) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		select {
		case c := <-r.calls:
			if c.GetPhase() == want {
				return c, nil
			}
			c.answer <- roundAnswer{err: fmt.Errorf("barrier phase %v, expected %v: %w", c.GetPhase(), want, dr.ErrInvalid)}
		case <-timer.C:
			return roundCall{}, context.DeadlineExceeded
		case <-ctx.Done():
			return roundCall{}, ctx.Err()
		}
	}
}

func bounded(ms int64, most time.Duration) time.Duration {
	if ms <= 0 || ms > most.Milliseconds() {
		return most
	}
	return time.Duration(ms) * time.Millisecond
}

// causeOf gives the reason for which ctx ended if err only says that it did.
func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
		return cause
	}
	return err
}

// groupStill is a session of the machine for a barrier.
type groupStill struct {
	still
	end     func()
	made    func(quiesce.Report, error)
	reached dr.Consistency
}

// Reached implements standstill.
func (g *groupStill) Reached() dr.Consistency { return g.reached }

// Release implements standstill.
func (g *groupStill) Release() {
	r, err := g.still.Release()
	g.end()
	g.made(r, err)
}

// prepareGroup makes the machine ready for a barrier: it fails rather than promise
// less than what was asked for, so that the group has a point as a whole or none.
func (m *pointMaker) prepareGroup(ctx context.Context, c *pb.BarrierCall) (standstill, error) {
	if err := errors.Join(m.calm(), m.complete()); err != nil {
		return nil, err
	}
	g := &groupStill{reached: dr.FileSystem}
	o := quiesce.Options{Point: quiesce.Point{Machine: m.machine.String(), ID: c.GetId(), Name: c.GetName()}}
	for _, d := range m.src.Disks() {
		o.Disks = append(o.Disks, d.Path)
	}
	if c.GetConsistency() == pb.Consistency_CONSISTENCY_APPLICATION {
		g.reached, o.Hooks = dr.Application, m.hooks
	}
	var err error
	if g.still, g.end, err = m.begin(ctx, o); err != nil {
		return nil, err
	}
	g.made = func(r quiesce.Report, err error) {
		m.log.Info("took part in a barrier", "group point", c.GetName(), "frozen", r.Frozen, "for", r.Duration, "hooks", r.Log, "error", err)
		if err := remarks(r, err); err != nil {
			m.notices.add(notice{"group-point-remark", true, fmt.Sprintf("group point %q: %v", c.GetName(), err), time.Now()})
		}
	}
	if err := m.waitCalm(ctx, calmLimit); err != nil {
		g.Release()
		return nil, err
	}
	return g, nil
}
