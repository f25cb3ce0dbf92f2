package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/quiesce"
)

// iceBox is a machine whose writers can be made to stand still.
type iceBox struct {
	mu      sync.Mutex
	open    chan struct{} // closed while nothing is frozen
	images  map[string]map[dr.DiskID][]byte
	mem     func() *capturetest.Mem
	asked   []quiesce.Options
	fail    error         // of Prepare
	refuse  error         // of Hold
	broken  error         // of Held
	takes   time.Duration // of Hold
	report  quiesce.Report
	leaks   bool // Held lies: the negative control
	holding time.Time
	longest time.Duration
}

func newIceBox(mem func() *capturetest.Mem) *iceBox {
	b := &iceBox{open: make(chan struct{}), mem: mem, images: map[string]map[dr.DiskID][]byte{}}
	close(b.open)
	return b
}

// write writes, unless everything stands still: then it waits.
func (b *iceBox) write(fn func()) {
	for {
		b.mu.Lock()
		select {
		case <-b.open:
			fn()
			b.mu.Unlock()
			return
		default:
		}
		open := b.open
		b.mu.Unlock()
		<-open
	}
}

// sessions returns what was asked for.
func (b *iceBox) sessions() []quiesce.Options {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.asked)
}

func (b *iceBox) prepare(_ context.Context, o quiesce.Options) (still, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked = append(b.asked, o)
	if b.fail != nil {
		return nil, b.fail
	}
	return &ice{iceBox: b, name: o.Point.Name}, nil
}

type ice struct {
	*iceBox
	name   string
	frozen bool
}

func (i *ice) Hold(ctx context.Context, limit time.Duration) error {
	sleep(ctx, i.takes, nil)
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.refuse != nil {
		return i.refuse
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	i.open, i.frozen, i.holding = make(chan struct{}), true, time.Now()
	i.images[i.name] = map[dr.DiskID][]byte{}
	for _, d := range i.mem().Disks() {
		i.images[i.name][d.ID] = i.mem().Image(d.ID)
	}
	if i.leaks {
		i.thawLocked()
	}
	return nil
}

func (i *ice) thawLocked() {
	if i.frozen {
		close(i.open)
		i.frozen = false
		i.longest = max(i.longest, time.Since(i.holding))
	}
}

func (i *ice) Held() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case i.leaks:
		return nil
	case !i.frozen:
		return errors.New("thawed")
	}
	return i.broken
}

func (i *ice) Release() (quiesce.Report, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.thawLocked()
	return i.report, nil
}

// onIce plays with an agent whose machine can stand still and is written to all the time, by three writers with pauses of at most pace.
func onIce(t *testing.T, pace time.Duration, do func(*lab, *iceBox)) {
	t.Helper()
	play(t, func(l *lab) {
		b := newIceBox(l.mem)
		l.still = newStillness(b.prepare, &quiesce.Hooks{Dir: "/hooks"})
		l.assign(l.assignment(nil))
		time.Sleep(2 * time.Second)
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		for n := range 3 {
			wg.Go(func() { scribbleOn(ctx, b, uint64(n), pace) })
		}
		do(l, b)
		cancel()
		wg.Wait()
	})
}

func scribbleOn(ctx context.Context, b *iceBox, seed uint64, pace time.Duration) {
	rng := rand.New(rand.NewPCG(seed, 7))
	for ctx.Err() == nil {
		d := twoDisks[rng.IntN(2)]
		b.write(func() { b.mem().Write(d.ID, rng.Int64N(d.Size/512)*512, sector(byte(rng.IntN(255)+1))) })
		time.Sleep(time.Duration(rng.Int64N(int64(pace))))
	}
}

func ask(kind pb.Consistency, name string) *pb.TagRequest {
	return &pb.TagRequest{Id: dr.NewNodeID().String(), Name: name, Consistency: kind}
}

// results returns what the agent says of its tags, by name.
func (l *lab) results(tags []*pb.TagRequest) map[string]*pb.TagResult {
	out := map[string]*pb.TagResult{}
	for _, r := range l.report(time.Now()).GetTags() {
		for _, t := range tags {
			if t.GetId() == r.GetId() {
				out[t.GetName()] = r
			}
		}
	}
	return out
}

// TestStillPoints: at a point for which everything stood still, the far side holds what
// the disks held then, and not a write more.
func TestStillPoints(t *testing.T) {
	onIce(t, time.Millisecond, func(l *lab, b *iceBox) {
		var tags []*pb.TagRequest
		for i := range 20 {
			kind := []pb.Consistency{pb.Consistency_CONSISTENCY_FILESYSTEM, pb.Consistency_CONSISTENCY_APPLICATION}[i%2]
			tags = append(tags, ask(kind, fmt.Sprint("t", i)))
		}
		l.assign(l.assignment(func(p *pb.AgentAssignment) { p.Tags = tags }))
		time.Sleep(5 * time.Second)
		if differ := compareTags(t, l, b); differ != 0 {
			t.Errorf("%d of 20 points are not what stood still", differ)
		}
		for _, tag := range tags {
			r := l.results(tags)[tag.GetName()]
			if r.GetPosition() == nil || r.GetConsistency() != tag.GetConsistency() || r.GetDetail() != "" {
				t.Errorf("%v became %v", tag, r)
			}
		}
		if b.longest > time.Second {
			t.Errorf("frozen for %s", b.longest)
		}
		for i, o := range b.sessions() {
			if hooks := o.Hooks != nil; hooks != (i%2 == 1) || len(o.Disks) != 2 || o.Point.Machine != l.machine.String() {
				t.Errorf("session %d: %+v", i, o)
			}
		}
	})
}

// TestThawedTooEarly is the negative control: if nobody notices that the file systems
// were thawed before the tag, points differ from what stood still.
func TestThawedTooEarly(t *testing.T) {
	onIce(t, time.Millisecond, func(l *lab, b *iceBox) {
		b.mu.Lock()
		b.leaks = true
		b.mu.Unlock()
		var tags []*pb.TagRequest
		for i := range 20 {
			tags = append(tags, ask(pb.Consistency_CONSISTENCY_FILESYSTEM, fmt.Sprint("t", i)))
		}
		l.assign(l.assignment(func(p *pb.AgentAssignment) { p.Tags = tags }))
		time.Sleep(5 * time.Second)
		if differ := compareTags(t, l, b); differ == 0 {
			t.Error("nobody noticed")
		}
	})
}

// compareTags counts the tags at which the far side held something else than the
// machine when it stood still.
func compareTags(t *testing.T, l *lab, b *iceBox) (differ int) {
	t.Helper()
	got := l.server.tagged()
	if len(got) != 20 {
		t.Fatalf("%d tags came", len(got))
	}
	for _, tag := range got {
		for id, image := range tag.disks {
			if !bytes.Equal(image, b.images[tag.Name][id]) {
				differ++
				break
			}
		}
	}
	return differ
}

// TestPointFallsBack: whatever fails, there is a crash-consistent point, which says why.
func TestPointFallsBack(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*iceBox)
		want   string
	}{
		{"hook", func(b *iceBox) { b.fail = fmt.Errorf("hook 50-postgresql: %w: exit status 1", quiesce.ErrHook) }, "50-postgresql"},
		{"freeze", func(b *iceBox) { b.refuse = fmt.Errorf("freeze /srv: %w", quiesce.ErrTimeout) }, "/srv"},
		{"endless freeze", func(b *iceBox) { b.takes = time.Hour }, "deadline"},
		{"thawed by others", func(b *iceBox) { b.broken = errors.New("somebody thawed it") }, "somebody thawed it"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			onIce(t, 10*time.Millisecond, func(l *lab, b *iceBox) {
				b.mu.Lock()
				tc.change(b)
				b.mu.Unlock()
				tags := []*pb.TagRequest{ask(pb.Consistency_CONSISTENCY_APPLICATION, "x")}
				l.assign(l.assignment(func(p *pb.AgentAssignment) { p.Tags = tags }))
				time.Sleep(15 * time.Second)
				r := l.results(tags)["x"]
				if r.GetPosition() == nil || r.GetConsistency() != pb.Consistency_CONSISTENCY_CRASH || !strings.Contains(r.GetDetail(), tc.want) {
					t.Errorf("became %v", r)
				}
				got := l.server.tagged()
				if len(got) != 1 || got[0].Consistency != dr.Crash || got[0].Name != "x" {
					t.Errorf("%d tags came", len(got))
				}
				if len(b.sessions()) != 1 {
					t.Errorf("tried %d times", len(b.sessions()))
				}
				events := l.report(time.Now()).GetEvents()
				if !slices.ContainsFunc(events, func(n *pb.Notice) bool {
					return n.GetCode() == "point-fallback" && strings.Contains(n.GetText(), tc.want)
				}) {
					t.Errorf("no event among %v", events)
				}
			})
		})
	}
}

// TestNoHooks: without hooks there is no application point.
func TestNoHooks(t *testing.T) {
	onIce(t, 10*time.Millisecond, func(l *lab, b *iceBox) {
		l.still.hooks = nil
		tags := []*pb.TagRequest{ask(pb.Consistency_CONSISTENCY_APPLICATION, "x")}
		l.assign(l.assignment(func(p *pb.AgentAssignment) { p.Tags = tags }))
		time.Sleep(2 * time.Second)
		if r := l.results(tags)["x"]; r.GetConsistency() != pb.Consistency_CONSISTENCY_CRASH || !strings.Contains(r.GetDetail(), "no hooks") {
			t.Errorf("became %v", r)
		}
		if n := len(b.sessions()); n != 0 {
			t.Errorf("%d sessions", n)
		}
	})
}

// TestPointWithRemark: what can't be frozen, and hooks that fail behind the point, are told.
func TestPointWithRemark(t *testing.T) {
	onIce(t, 10*time.Millisecond, func(l *lab, b *iceBox) {
		b.mu.Lock()
		b.report = quiesce.Report{Unfrozen: []string{"/boot/efi"}, Hooks: []quiesce.HookResult{{Err: errors.New("post-thaw/10-x failed")}}}
		b.mu.Unlock()
		tags := []*pb.TagRequest{ask(pb.Consistency_CONSISTENCY_FILESYSTEM, "x")}
		l.assign(l.assignment(func(p *pb.AgentAssignment) { p.Tags = tags }))
		time.Sleep(2 * time.Second)
		r := l.results(tags)["x"]
		if r.GetConsistency() != pb.Consistency_CONSISTENCY_FILESYSTEM || !strings.Contains(r.GetDetail(), "/boot/efi") || !strings.Contains(r.GetDetail(), "post-thaw/10-x") {
			t.Errorf("became %v", r)
		}
	})
}

// TestPointWaits: while the stream is not exact nothing is frozen; a tag that nobody
// wants any more is forgotten.
func TestPointWaits(t *testing.T) {
	play(t, func(l *lab) {
		b := newIceBox(l.mem)
		l.still = newStillness(b.prepare, nil)
		l.server.set(func() { l.server.mu.down = true })
		tags := []*pb.TagRequest{ask(pb.Consistency_CONSISTENCY_FILESYSTEM, "first")}
		l.assign(l.assignment(func(p *pb.AgentAssignment) {
			p.Tags = tags
			p.Settings = &pb.AgentSettings{Points: &pb.PointSchedule{FilesystemEveryMs: new(int64(10_000))}}
		}))
		time.Sleep(time.Minute)
		if len(b.sessions()) != 0 {
			t.Error("prepared while no point can be")
		}
		tags = []*pb.TagRequest{ask(pb.Consistency_CONSISTENCY_FILESYSTEM, "second")}
		l.assign(l.assignment(func(p *pb.AgentAssignment) { p.Tags = tags }))
		time.Sleep(time.Second)
		l.server.set(func() { l.server.mu.down = false })
		time.Sleep(time.Minute)
		if r := l.results(tags)["second"]; r.GetConsistency() != pb.Consistency_CONSISTENCY_FILESYSTEM || r.GetPosition() == nil {
			t.Errorf("became %v", r)
		}
		if got := l.server.tagged(); len(got) != 1 {
			t.Errorf("%d tags came", len(got))
		}
	})
}

func TestHeldTag(t *testing.T) {
	var answer error
	for _, tc := range []struct {
		name   string
		change func(*scene, *order)
		want   error
	}{
		{"placed", func(*scene, *order) {}, nil},
		{"not held", func(*scene, *order) { answer = quiesce.ErrTimeout }, quiesce.ErrTimeout},
		{"overflow", func(s *scene, _ *order) { s.src.Overflow() }, errNotExact},
		{"marked", func(s *scene, _ *order) { s.src.Mark(dr.Extent{Disk: 1, Length: 4096}) }, errNotExact},
		{"new stream", func(s *scene, _ *order) {
			s.at.Position.Seq += 100
			s.out.resume(s.at, 0, ReasonInitial)
		}, errNotExact},
		{"given up", func(_ *scene, o *order) { o.state.Store(orderWithdrawn) }, context.Canceled},
	} {
		t.Run(tc.name, func(t *testing.T) {
			answer = nil
			s := newScene(t, 0)
			s.connect()
			s.untilExact()
			s.src.Write(1, 0, sector(1))
			o := ordered(s, func() error { return answer })
			tc.change(s, o)
			for range 5 {
				s.step()
			}
			if o.settled() == o.withdrawn() || !o.withdrawn() && !errors.Is(o.why, tc.want) {
				t.Errorf("settled %v, told %v, want %v", o.settled(), o.why, tc.want)
			}
			s.receive()
			placed := slices.ContainsFunc(s.seen, func(f *frame.Frame) bool { return f.Kind == frame.TagKind })
			if placed != (tc.want == nil) || len(s.rep.tags.orders) > 0 {
				t.Errorf("placed %v, %d wait", placed, len(s.rep.tags.orders))
			}
		})
	}
}

// slowSource hands nothing over for a while.
type slowSource struct {
	*hooked
	stuck bool
}

func (s *slowSource) Next(ctx context.Context, wait time.Duration, fn func(capture.Event) error) (int, error) {
	if s.stuck {
		return 0, nil
	}
	return s.hooked.Next(ctx, wait, fn)
}

// TestHeldTagIsBehindItsMark: it waits until all that was submitted before is in the stream.
func TestHeldTagIsBehindItsMark(t *testing.T) {
	s := newScene(t, 0)
	slow := &slowSource{hooked: s.src}
	s.rep.src = slow
	s.connect()
	s.untilExact()
	slow.stuck = true
	s.src.Write(1, 0, sector(1))
	var answer error
	o := ordered(s, func() error { return answer })
	for range 5 {
		s.step()
	}
	if o.settled() {
		t.Fatal("placed before what was written")
	}
	slow.stuck = false
	for range 5 {
		s.step()
	}
	s.receive()
	if !o.settled() || s.far[0] != 1 {
		t.Error("not placed behind what was written")
	}
}

func TestPlaceHeldGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeServer(t, dr.MachineID{1}, twoDisks)
		s := newStream(capturetest.NewMem(twoDisks...), streamConfig{
			machine: dr.MachineID{1}, timeline: 1, tune: defaultTuning(), dial: f.dial, notices: &chronicle{}, news: func() {},
		})
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		s.mu.status.phase = Exact
		if err := s.points.hold(ctx, frozenStill{}, dr.Tag{}, 300*time.Millisecond); !errors.Is(err, quiesce.ErrTimeout) {
			t.Errorf("nobody steps: %v", err)
		}
		if len(s.mu.orders) != 1 || !s.mu.orders[0].withdrawn() {
			t.Error("it still waits")
		}
	})
}

// TestRecoverHooks: what an agent that was killed had prepared is undone before anything
// else is prepared.
func TestRecoverHooks(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("hooks need Linux")
	}
	dir := t.TempDir()
	for _, d := range []string{"post-thaw.d", "run/run-1"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(dir+"/post-thaw.d/a", []byte("#!/bin/sh\nexit 4\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	a := newLab(t).agent
	a.still = newStillness(never, &quiesce.Hooks{Dir: dir, Run: dir + "/run", Owner: uint32(os.Getuid())})
	run := a.recoverHooks(dr.MachineID{1})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, _, err := a.still.begin(ctx, quiesce.Options{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("prepared before the hooks had run: %v", err)
	}
	run()
	if _, _, err := a.still.begin(t.Context(), quiesce.Options{}); !errors.Is(err, dr.ErrUnsupported) {
		t.Errorf("prepared behind the hooks: %v", err)
	}
	events := a.notices.list()
	if len(events) != 1 || !strings.Contains(events[0].text, "post-thaw/a") || !events[0].warn {
		t.Errorf("events %v", events)
	}
}
