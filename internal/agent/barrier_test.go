package agent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
)

// stillFake is a machine that can be held.
type stillFake struct {
	slow     time.Duration // of Hold
	fail     error         // of Hold
	until    time.Time     // it thaws by itself then
	held     bool
	released int
}

func (s *stillFake) Hold(ctx context.Context, limit time.Duration) error {
	select {
	case <-time.After(s.slow):
	case <-ctx.Done():
		return ctx.Err()
	}
	s.held, s.until = s.fail == nil, time.Now().Add(limit)
	return s.fail
}

func (s *stillFake) Held() error {
	if !s.held || s.released > 0 || time.Now().After(s.until) {
		return errors.New("thawed")
	}
	return nil
}

func (s *stillFake) Release() {
	s.held = false
	s.released++
}

func (s *stillFake) Reached() dr.Consistency { return dr.FileSystem }

// bench is a machine that takes part in barriers.
type barrierBench struct {
	*barriers
	stills []*stillFake
	next   stillFake // as the next one is made
	tags   []dr.Tag
	slow   time.Duration // of placing
	cancel context.CancelFunc
	done   chan struct{}
}

// newBarrierBench is for a synctest bubble.
func newBarrierBench(t *testing.T) *barrierBench {
	b := &barrierBench{barriers: &barriers{}, done: make(chan struct{})}
	b.prepare = func(ctx context.Context, c *pb.BarrierCall) (standstill, error) {
		if c.GetName() == "unprepared" {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		s := b.next
		b.stills = append(b.stills, &s)
		return &s, nil
	}
	b.place = func(ctx context.Context, tag dr.Tag) (dr.Position, error) {
		select {
		case <-time.After(b.slow):
		case <-ctx.Done():
			return dr.Position{}, ctx.Err()
		}
		b.tags = append(b.tags, tag)
		return dr.Position{Timeline: 1, Seq: dr.Seq(len(b.tags))}, nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	b.cancel = cancel
	go func() {
		defer close(b.done)
		_ = b.run(ctx)
	}()
	synctest.Wait()
	return b
}

// end ends the stream; everything must have been released once.
func (b *barrierBench) end(t *testing.T) {
	t.Helper()
	b.cancel()
	<-b.done
	for i, s := range b.stills {
		if s.released != 1 {
			t.Errorf("round %d was released %d times", i, s.released)
		}
	}
}

func (b *barrierBench) call(t *testing.T, id byte, p pb.BarrierPhase, change ...func(*pb.BarrierCall)) (*pb.BarrierAnswer, error) {
	t.Helper()
	c := &pb.BarrierCall{Id: dr.NodeID{id}.String(), Phase: p, Name: "n", Consistency: pb.Consistency_CONSISTENCY_APPLICATION, LimitMs: 300}
	for _, fn := range change {
		fn(c)
	}
	body, err := proto.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	out, err := b.handle(t.Context(), body)
	if err != nil {
		return nil, err
	}
	a := &pb.BarrierAnswer{}
	return a, proto.Unmarshal(out, a)
}

const (
	prepare = pb.BarrierPhase_BARRIER_PHASE_PREPARE
	hold    = pb.BarrierPhase_BARRIER_PHASE_HOLD
	tagIt   = pb.BarrierPhase_BARRIER_PHASE_TAG
	abort   = pb.BarrierPhase_BARRIER_PHASE_ABORT
)

// through makes the calls in order and fails on the first error.
func (b *barrierBench) through(t *testing.T, id byte, phases ...pb.BarrierPhase) (a *pb.BarrierAnswer) {
	t.Helper()
	for _, p := range phases {
		var err error
		if a, err = b.call(t, id, p); err != nil {
			t.Fatalf("%v: %v", p, err)
		}
	}
	return a
}

func (b *barrierBench) wantTags(t *testing.T, want ...dr.Consistency) {
	t.Helper()
	var got []dr.Consistency
	for _, tag := range b.tags {
		got = append(got, tag.Consistency)
	}
	if !slices.Equal(got, want) {
		t.Errorf("tags %v, want %v", got, want)
	}
}

func TestBarrierOfAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBarrierBench(t)
		b.slow = 20 * time.Millisecond
		a := b.through(t, 1, prepare, hold, tagIt)
		if a.GetPosition().GetSeq() != 1 || a.GetConsistency() != pb.Consistency_CONSISTENCY_FILESYSTEM || a.GetHeldMs() < 20 || a.GetHeldMs() > 30 {
			t.Errorf("answer %v", a)
		}
		if tag := b.tags[0]; tag.ID != [16]byte{1} || tag.Group != tag.ID || tag.Name != "n" {
			t.Errorf("tag %+v", tag)
		}
		b.wantTags(t, dr.FileSystem)
		b.through(t, 2, prepare, hold, tagIt)
		b.through(t, 1, abort) // that one is over
		b.wantTags(t, dr.FileSystem, dr.FileSystem)
		b.through(t, 2, abort)
		b.wantTags(t, dr.FileSystem, dr.FileSystem, dr.Revoked)
		b.end(t)
	})
}

// Whatever ends a round early, it is released and leaves no tag.
func TestBarrierEndsEarly(t *testing.T) {
	for name, c := range map[string]struct {
		until []pb.BarrierPhase
		then  func(*testing.T, *barrierBench)
	}{
		"abort when prepared": {[]pb.BarrierPhase{prepare}, func(t *testing.T, b *barrierBench) { b.through(t, 1, abort) }},
		"abort when held":     {[]pb.BarrierPhase{prepare, hold}, func(t *testing.T, b *barrierBench) { b.through(t, 1, abort) }},
		"silence when prepared": {[]pb.BarrierPhase{prepare}, func(_ *testing.T, b *barrierBench) {
			time.Sleep(400 * time.Millisecond)
		}},
		"silence when held": {[]pb.BarrierPhase{prepare, hold}, func(_ *testing.T, b *barrierBench) {
			time.Sleep(400 * time.Millisecond)
		}},
		"another barrier": {[]pb.BarrierPhase{prepare, hold}, func(t *testing.T, b *barrierBench) {
			b.through(t, 2, prepare)
			b.through(t, 2, abort)
		}},
		"the end of the stream": {[]pb.BarrierPhase{prepare, hold}, func(_ *testing.T, b *barrierBench) {
			b.cancel()
			<-b.done
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBarrierBench(t)
				b.through(t, 1, c.until...)
				c.then(t, b)
				synctest.Wait()
				if b.stills[0].released != 1 {
					t.Error("not released")
				}
				if _, err := b.call(t, 1, tagIt); !errors.Is(err, dr.ErrNotFound) {
					t.Errorf("a tag afterwards: %v", err)
				}
				b.wantTags(t)
				b.end(t)
			})
		})
	}
}

func TestBarrierFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBarrierBench(t)
		if _, err := b.call(t, 1, prepare, func(c *pb.BarrierCall) { c.Name = "unprepared" }); err == nil {
			t.Error("prepared for ever")
		}
		b.next.fail = errors.New("can't be frozen")
		b.through(t, 2, prepare)
		if _, err := b.call(t, 2, hold); err == nil || !strings.Contains(err.Error(), "can't be frozen") {
			t.Errorf("hold: %v", err)
		}
		b.next = stillFake{}
		// The hold ends while the tag is on its way: whether it was placed or not, it is none.
		b.through(t, 3, prepare, hold)
		b.slow = time.Second
		if _, err := b.call(t, 3, tagIt); err == nil {
			t.Error("tagged after the limit")
		}
		b.wantTags(t)
		b.slow = 0
		b.through(t, 4, prepare, hold)
		b.stills[len(b.stills)-1].until = time.Now().Add(-1) // somebody thawed it
		if _, err := b.call(t, 4, tagIt); err == nil {
			t.Error("tagged what was thawed")
		}
		b.wantTags(t, dr.FileSystem, dr.Revoked)
		b.end(t)
		if _, err := b.call(t, 5, prepare); !errors.Is(err, dr.ErrUnavailable) {
			t.Errorf("after the end: %v", err)
		}
	})
}

func TestBarrierRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBarrierBench(t)
		if _, err := b.handle(t.Context(), []byte("\xff\xff garbage")); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("garbage: %v", err)
		}
		for what, c := range map[string]struct {
			phase  pb.BarrierPhase
			change func(*pb.BarrierCall)
			want   error
		}{
			"no id":         {prepare, func(c *pb.BarrierCall) { c.Id = "" }, dr.ErrInvalid},
			"no phase":      {0, func(*pb.BarrierCall) {}, dr.ErrUnsupported},
			"hold of none":  {hold, func(*pb.BarrierCall) {}, dr.ErrNotFound},
			"a later phase": {99, func(*pb.BarrierCall) {}, dr.ErrUnsupported},
		} {
			if _, err := b.call(t, 1, c.phase, c.change); !errors.Is(err, c.want) {
				t.Errorf("%s: %v, want %v", what, err, c.want)
			}
		}
		b.through(t, 1, abort) // of nothing
		b.through(t, 1, prepare)
		if _, err := b.call(t, 1, tagIt); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("tag before hold: %v", err)
		}
		b.through(t, 1, hold)
		long := func(c *pb.BarrierCall) { c.Name = strings.Repeat("x", dr.MaxTagName+1) }
		if _, err := b.call(t, 1, tagIt, long); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("long name: %v", err)
		}
		b.end(t)
	})
}
