package procserver

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/link"
)

// groups leads the barriers of the groups that are assigned: those that are asked
// for, and those of their schedules, one at a time for each group.
type groups struct {
	stream func(dr.MachineID) *stream // nil: not here
	notice func(code string, severity pb.Severity, text string)
	log    *slog.Logger
	leads  sync.WaitGroup // the goroutines of all that were led

	mu struct {
		sync.Mutex
		led     map[string]*ledGroup
		results []*pb.GroupTagResult // newest last, bounded
	}
}

// ledGroup is a group with the goroutine that leads it.
type ledGroup struct {
	cancel  context.CancelFunc
	wish    chan struct{} // has a token when want changed
	failing int           // barriers that failed in a row; of the goroutine

	mu struct {
		sync.Mutex
		want *pb.GroupAssignment
	}
}

const (
	maxGroupResults = 64
	// prepareWithin bounds what happens before anything is frozen: hooks, and writing
	// out what is dirty.
	prepareWithin = 60 * time.Second
	// durableWithin is how long a scheduled tag may take to become durable before
	// that counts as a failure.
	durableWithin = 5 * time.Minute
	durablePoll   = time.Second // how soon it is seen that a stream began anew
	// alertAfter failures in a row of a group's barrier there is an alert.
	alertAfter = 3
)

// assign makes the groups those of an assignment.
func (g *groups) assign(ctx context.Context, want []*pb.GroupAssignment) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.mu.led == nil {
		g.mu.led = map[string]*ledGroup{}
	}
	for id, l := range g.mu.led {
		if !slices.ContainsFunc(want, func(a *pb.GroupAssignment) bool { return a.GetGroupId() == id }) {
			l.cancel()
			delete(g.mu.led, id)
		}
	}
	for _, a := range want {
		l := g.mu.led[a.GetGroupId()]
		if l == nil {
			l = g.leadLocked(ctx, a.GetGroupId())
		}
		l.set(a)
	}
}

func (g *groups) leadLocked(ctx context.Context, id string) *ledGroup {
	ctx, cancel := context.WithCancel(ctx)
	l := &ledGroup{cancel: cancel, wish: make(chan struct{}, 1)}
	g.mu.led[id] = l
	g.leads.Go(func() { g.lead(ctx, l) })
	return l
}

// close ends all groups and waits for them. The streams must stand until then.
func (g *groups) close() {
	g.mu.Lock()
	led := g.mu.led
	g.mu.led = nil
	g.mu.Unlock()
	for _, l := range led {
		l.cancel()
	}
	g.leads.Wait()
}

func (l *ledGroup) set(a *pb.GroupAssignment) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.want = a
	select {
	case l.wish <- struct{}{}:
	default:
	}
}

func (l *ledGroup) want() *pb.GroupAssignment {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.want
}

// lead tags a group when it is due until ctx ends.
func (g *groups) lead(ctx context.Context, l *ledGroup) {
	last := time.Now() // not at once after a start: the agents are about to connect
	for ctx.Err() == nil {
		a := l.want()
		if t := g.asked(a); t != nil {
			g.tag(ctx, l, a, t)
			continue
		}
		wait := time.Hour
		if every := time.Duration(a.GetTagEverySeconds()) * time.Second; every > 0 {
			if wait = every - time.Since(last); wait <= 0 {
				last = time.Now()
				g.tag(ctx, l, a, scheduled(a, last))
				continue
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-l.wish:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// scheduled is the tag that a group's schedule asks for.
func scheduled(a *pb.GroupAssignment, now time.Time) *pb.GroupTagRequest {
	return &pb.GroupTagRequest{
		Name:        fmt.Sprintf("%.200s %s", a.GetName(), now.UTC().Format(time.RFC3339)),
		Consistency: a.GetConsistency(), DeadlineNs: now.Add(durableWithin).UnixNano(),
	}
}

// asked returns the oldest tag that is asked for and has no result.
func (g *groups) asked(a *pb.GroupAssignment) *pb.GroupTagRequest {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, t := range a.GetTags() {
		if !slices.ContainsFunc(g.mu.results, func(r *pb.GroupTagResult) bool { return r.GetId() == t.GetId() }) {
			return t
		}
	}
	return nil
}

// tag holds one barrier and notes what came of it.
func (g *groups) tag(ctx context.Context, l *ledGroup, a *pb.GroupAssignment, t *pb.GroupTagRequest) {
	ctx, cancel := context.WithDeadline(ctx, time.Unix(0, t.GetDeadlineNs()))
	defer cancel()
	r := &pb.GroupTagResult{Id: t.GetId(), GroupId: a.GetGroupId(), Name: t.GetName()}
	streams := map[dr.MachineID]progressOf{}
	got, err := g.barrier(ctx, a, t, r, streams)
	if err == nil {
		err = awaitDurable(ctx, streams, got.at)
	}
	r.TimeNs = time.Now().UnixNano()
	if err != nil {
		r.State, r.Error = pb.GroupTagState_GROUP_TAG_STATE_FAILED, err.Error()
		l.failing++
	} else {
		r.State, r.Consistency, r.HeldMs = pb.GroupTagState_GROUP_TAG_STATE_DURABLE, got.consistency, got.held.Seconds()*1000
		l.failing = 0
	}
	g.log.Info("group tagged", "group", a.GetName(), "tag", t.GetName(), "machines", len(got.at), "held", got.held, "detail", got.detail, "error", err)
	if got.detail != "" {
		g.notice("group-point-weaker", pb.Severity_SEVERITY_WARNING, fmt.Sprintf("group %s, tag %q: %s", a.GetName(), t.GetName(), got.detail))
	}
	if l.failing == alertAfter {
		g.notice("group-points-failing", pb.Severity_SEVERITY_ERROR, fmt.Sprintf("group %s: %d tags in a row failed: %v", a.GetName(), l.failing, err))
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.mu.results = append(g.mu.results, r); len(g.mu.results) > maxGroupResults {
		g.mu.results = g.mu.results[1:]
	}
}

// progressOf is a stream and what tells its progress, which is another one after
// the stream has begun anew: then positions mean something else.
type progressOf struct {
	*stream
	*link.Progress
}

// barrier notes the members' streams, as they are before it, in streams.
func (g *groups) barrier(ctx context.Context, a *pb.GroupAssignment, t *pb.GroupTagRequest, r *pb.GroupTagResult, streams map[dr.MachineID]progressOf) (tagged, error) {
	b := barrier{
		name: t.GetName(), consistency: t.GetConsistency(), prepare: prepareWithin,
		hold: time.Duration(a.GetHoldLimitMs()) * time.Millisecond, members: map[dr.MachineID]member{},
	}
	rand.Read(b.id[:]) // never fails
	r.BarrierId = dr.NodeID(b.id).String()
	for _, text := range a.GetMachineIds() {
		id, err := dr.ParseMachineID(text)
		if err != nil {
			return tagged{}, fmt.Errorf("machine %q of the group: %w", text, err)
		}
		s := g.stream(id)
		if s == nil {
			return tagged{}, fmt.Errorf("machine %v has no stream here: %w", id, dr.ErrUnavailable)
		}
		b.members[id], streams[id] = memberOf(s), progressOf{s, s.progress()}
	}
	if len(b.members) == 0 {
		return tagged{}, fmt.Errorf("the group has no machines: %w", dr.ErrInvalid)
	}
	return b.run(ctx)
}

// awaitDurable waits until the far side has all of it.
func awaitDurable(ctx context.Context, streams map[dr.MachineID]progressOf, at map[dr.MachineID]dr.Position) error {
	for id, p := range at {
		s := streams[id]
		for last := s.Get(); last.Durable < p.Seq; {
			short, cancel := context.WithTimeout(ctx, durablePoll)
			next, err := s.Wait(short, last)
			cancel()
			if err == nil {
				last = next
			}
			if s.progress() != s.Progress {
				return fmt.Errorf("the stream of machine %v began anew before its tag was durable: %w", id, dr.ErrUnavailable)
			}
			if ctx.Err() != nil {
				return fmt.Errorf("the tag of machine %v was not durable in time: %w", id, dr.ErrUnavailable)
			}
		}
	}
	return nil
}

// progress tells how far the stream is, since it began or began anew.
func (s *stream) progress() *link.Progress {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.progress
}

// report returns the latest results, newest last.
func (g *groups) report() (out []*pb.GroupTagResult) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, r := range g.mu.results {
		out = append(out, proto.CloneOf(r))
	}
	return out
}
