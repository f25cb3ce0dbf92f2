package procserver

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"

	"farside/internal/frame"
)

// sim is a stream without bytes: churn comes in, a link takes it away, and the
// controller under test decides.
type sim struct {
	c    *controller
	at   time.Duration // since the start
	hot  float64       // bytes of the places that are written again and again, evenly
	ps   []*piece      // the last is the active segment
	sent float64
	in   float64
	busy func(level frame.Compression) float64
	rpo  time.Duration // now

	worst     time.Duration // RPO
	folds     int
	flips     int // changes of behind
	levels    int // changes of level
	was       settings
	noFolding bool // negative control
}

// piece is a segment: bytes that are not sent yet, of the churn of a time.
type piece struct {
	size, left float64
	churn      float64
	from, to   time.Duration
	begun      bool
	folded     bool
}

const simStep = 50 * time.Millisecond

func newSim(hot float64) *sim {
	return &sim{
		c: newController(frame.Zstd), hot: hot, ps: []*piece{{}},
		busy: func(frame.Compression) float64 { return 0.3 }, was: settings{level: levelNormal},
	}
}

// run goes on for d with a churn and a link, in bytes per second.
func (s *sim) run(d time.Duration, churn, link func(time.Duration) float64) {
	for end := s.at + d; s.at < end; {
		s.at += simStep
		s.grow(churn(s.at) * simStep.Seconds())
		rate := link(s.at)
		s.send(rate * simStep.Seconds())
		s.worst = max(s.worst, s.rpo)
		if s.at%tickEvery == 0 {
			s.decide(rate > 0)
		}
	}
}

func (s *sim) grow(n float64) {
	s.in += n
	p := s.ps[len(s.ps)-1]
	if p.size > 64<<20 {
		p = s.cut()
	}
	if p.size == 0 {
		p.from = s.at - simStep
	}
	p.size, p.left, p.churn, p.to = p.size+n, p.left+n, p.churn+n, s.at
}

func (s *sim) cut() *piece {
	s.ps = append(s.ps, &piece{from: s.at, to: s.at})
	return s.ps[len(s.ps)-1]
}

func (s *sim) send(n float64) {
	s.rpo = 0
	for len(s.ps) > 0 {
		p := s.ps[0]
		took := min(n, p.left)
		p.left, n, s.sent = p.left-took, n-took, s.sent+took
		p.begun = p.begun || took > 0
		if p.left > 0.5 {
			s.rpo = s.at - p.from
			if !p.folded { // each write is a point
				s.rpo -= time.Duration(float64(p.to-p.from) * (1 - p.left/p.size))
			}
			return
		}
		if len(s.ps) == 1 {
			return
		}
		s.ps = s.ps[1:]
	}
}

func (s *sim) decide(connected bool) {
	m := measures{
		now: time.Unix(0, 0).Add(s.at), connected: connected, stored: int64(s.in), sent: int64(s.sent),
		age: s.rpo, busy: s.busy(s.was.level),
	}
	for _, p := range s.ps {
		m.backlog += int64(p.left)
		if p.begun {
			m.ahead += int64(p.left)
		} else {
			m.foldable += int64(p.left)
		}
	}
	x := s.c.next(m)
	if x.behind != s.was.behind {
		s.flips++
	}
	if x.level != s.was.level {
		s.levels++
	}
	if x.cut {
		s.cut()
	}
	if x.fold && !s.noFolding {
		s.fold()
	}
	s.was = x
}

// fold merges all that is not begun: of so much churn over the hot places, that is left.
func (s *sim) fold() {
	i := 0
	for i < len(s.ps) && s.ps[i].begun {
		i++
	}
	next := piece{folded: true, from: s.ps[i].from}
	before := 0.0
	for _, p := range s.ps[i:] {
		next.churn, before, next.to = next.churn+p.churn, before+p.left, p.to
	}
	next.size = min(before, s.hot*(1-math.Exp(-next.churn/s.hot)))
	next.left = next.size
	s.c.folded(int64(before), int64(before-next.size))
	if next.size > 0.9*before {
		return
	}
	s.folds++
	s.ps = append(s.ps[:i:i], &next)
	s.cut()
}

func rate(mb float64) func(time.Duration) float64 {
	return func(time.Duration) float64 { return mb * 1e6 }
}

// The link takes a tenth of the churn: without folding the RPO grows by 0.9 s
// each second; with it, it stays where one round over the hot places takes it.
func TestControllerAtATenthOfTheChurn(t *testing.T) {
	s := newSim(20e6)
	s.run(30*time.Second, rate(54), rate(200))
	if s.folds != 0 || s.worst > time.Second {
		t.Fatalf("before: %d folds, RPO %v", s.folds, s.worst)
	}
	s.run(60*time.Second, rate(54), rate(5.4))
	s.worst = 0
	s.run(10*time.Minute, rate(54), rate(5.4))
	// One round is 3.7 s of sending; an epoch's point comes when all of it and of the one before is sent.
	if s.worst > 15*time.Second {
		t.Errorf("RPO up to %v while behind", s.worst)
	}
	before, at := s.folds, s.at
	for s.rpo > time.Second {
		s.run(simStep, rate(54), rate(200))
	}
	if d := s.at - at; d > 5*time.Second {
		t.Errorf("RPO recovered after %v", d)
	}
	s.run(15*time.Second, rate(54), rate(200))
	if s.was.behind || s.folds > before+1 || s.flips != 2 {
		t.Errorf("afterwards: behind %v, %d more folds, %d flips", s.was.behind, s.folds-before, s.flips)
	}
	lost := newSim(20e6)
	lost.noFolding = true
	lost.run(2*time.Minute, rate(54), rate(5.4))
	if lost.worst < time.Minute {
		t.Errorf("negative control: RPO %v without folding", lost.worst)
	}
}

// Ten minutes without a link, then one of twice the churn. Without folding it would take ten minutes
// more to catch up.
func TestControllerAfterAnOutage(t *testing.T) {
	s := newSim(50e6)
	s.run(20*time.Second, rate(54), rate(108))
	s.run(10*time.Minute, rate(54), rate(0))
	s.worst = 0
	at := s.at
	for s.run(simStep, rate(54), rate(108)); s.rpo > 2*time.Second; s.run(simStep, rate(54), rate(108)) {
		if s.at-at > time.Minute {
			t.Fatalf("RPO is still %v", s.rpo)
		}
	}
	if d := s.at - at; d > 10*time.Second {
		t.Errorf("RPO recovered after %v", d)
	}
	s.run(20*time.Second, rate(54), rate(108))
	if s.was.behind || s.flips != 2 {
		t.Errorf("behind %v, %d flips", s.was.behind, s.flips)
	}
}

// A short outage is not worth losing points: the link catches up by itself.
func TestControllerKeepsPointsWhereItCan(t *testing.T) {
	s := newSim(50e6)
	s.run(20*time.Second, rate(54), rate(400))
	s.run(10*time.Second, rate(54), rate(0))
	s.run(20*time.Second, rate(54), rate(400))
	if s.folds != 0 || s.rpo > time.Second || s.flips != 2 {
		t.Errorf("%d folds, RPO %v, %d flips", s.folds, s.rpo, s.flips)
	}
}

// Whatever link and churn do, nothing flaps: behind changes at most once per
// aheadFor, and folds keep their pause.
func TestControllerDoesNotFlap(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		s := newSim(rapid.Float64Range(1e6, 1e9).Draw(rt, "hot"))
		link := rapid.SliceOfN(rapid.Float64Range(0, 100), 4, 12).Draw(rt, "link")
		churn := rapid.SliceOfN(rapid.Float64Range(0, 100), 4, 12).Draw(rt, "churn")
		every := time.Duration(rapid.IntRange(100, 20_000).Draw(rt, "every")) * time.Millisecond
		at := func(v []float64) func(time.Duration) float64 {
			return func(t time.Duration) float64 { return v[int(t/every)%len(v)] * 1e6 }
		}
		const length = 5 * time.Minute
		s.run(length, at(churn), at(link))
		if most := 2 + 2*int(length/aheadFor); s.flips > most || s.folds > int(length/foldPause)+1 || s.levels > int(length/levelSettle)+1 {
			rt.Fatalf("%d flips, %d folds, %d levels", s.flips, s.folds, s.levels)
		}
	})
}

// At any constant load the compression comes to rest.
func TestControllerLevelsComeToRest(t *testing.T) {
	cost := map[frame.Compression]float64{frame.Plain: 0.05, frame.S2Fast: 1 / 766., frame.ZstdFastest: 1 / 308., frame.ZstdDefault: 1 / 231., frame.ZstdBetter: 1 / 155.}
	cost[frame.Plain] = 1 / 2018.
	rapid.Check(t, func(rt *rapid.T) {
		load := rapid.Float64Range(0, 2000).Draw(rt, "MB/s per worker")
		behind := rapid.Bool().Draw(rt, "behind")
		s := newSim(1e9)
		s.busy = func(l frame.Compression) float64 { return min(1, load*cost[l]) }
		link := rate(100)
		if behind {
			link = rate(1)
		}
		s.run(30*time.Second, rate(20), link)
		before := s.levels
		s.run(2*time.Minute, rate(20), link)
		if s.levels > before {
			rt.Fatalf("%d changes of level at rest", s.levels-before)
		}
		if behind && s.was.level < frame.S2Fast {
			rt.Fatal("no compression on a slow link")
		}
	})
}

func TestControllerLeavesAChosenCodecAlone(t *testing.T) {
	c := newController(frame.S2)
	for i := range 100 {
		s := c.next(measures{now: time.Unix(int64(i), 0), connected: true, busy: 1, age: time.Minute, backlog: 1 << 30})
		if s.level != frame.S2Fast {
			t.Fatal(s.level)
		}
	}
}

// A full spool is folded for room without a link too.
func TestControllerFoldsForRoom(t *testing.T) {
	c := newController(frame.Zstd)
	m := measures{now: time.Unix(1, 0), backlog: 600, age: time.Hour, foldable: 500, used: 600, limit: 1000}
	c.next(m)
	m.now = m.now.Add(2 * foldPause)
	if !c.next(m).fold {
		t.Error("not folded")
	}
	c.folded(500, 0)
	for range 100 {
		if m.now = m.now.Add(foldPause); c.next(m).fold {
			t.Fatal("folded again, though it gained nothing")
		}
	}
	m.foldable = 1000
	if m.now = m.now.Add(foldPause); !c.next(m).fold {
		t.Error("not tried again with twice as much")
	}
}
