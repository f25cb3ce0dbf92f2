package simtest

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"farside/internal/dr"
	"farside/test/wan"
)

// Kind says what a Step does.
type Kind uint8

// The kinds of steps. Each does something in any state of a World, or nothing, so that any part of a history
// is a history.
const (
	Write Kind = iota
	Burst      // many writes at once
	Land       // some writes in flight land
	Tag
	Look // at a position that is offered
	Wait
	KillAgent
	RestartAgent
	Reboot
	KillSource // the process server
	PowerSource
	KillTarget // the master target
	PowerTarget
	LoseSpool
	FillSource
	FillTarget
	CutLine
	SlowLine
	ResetLine
	HalfOpenLine
	Heal
	SmallRing
	kinds
)

var kindNames = [kinds]string{
	"write", "burst", "land", "tag", "look", "wait", "kill agent", "restart agent", "reboot", "kill source", "power source",
	"kill target", "power target", "lose spool", "fill source", "fill target", "cut line", "slow line", "reset line", "half-open line", "heal", "small ring",
}

// weights say how often each kind comes, of kinds with any.
var weights = [kinds]int{
	Write: 40, Burst: 8, Land: 12, Tag: 4, Look: 6, Wait: 20, KillAgent: 3, RestartAgent: 2, Reboot: 2, KillSource: 2, PowerSource: 2,
	KillTarget: 2, PowerTarget: 2, LoseSpool: 1, FillSource: 1, FillTarget: 1, CutLine: 2, SlowLine: 2, ResetLine: 2, HalfOpenLine: 1, Heal: 4, SmallRing: 1,
}

// Step is one thing that happens. What it happens to follows from N.
type Step struct {
	Kind Kind
	N    uint64
}

func (s Step) String() string { return fmt.Sprintf("%s %x", kindNames[s.Kind], s.N) }

// History is what happens to a World.
type History struct {
	Config Config
	Steps  []Step
}

func (h History) String() string {
	var b strings.Builder
	for _, s := range h.Steps {
		fmt.Fprintf(&b, "%v; ", s)
	}
	return b.String()
}

// NewHistory makes the history of a seed.
func NewHistory(seed uint64, steps int) History {
	rng := rand.New(rand.NewPCG(seed, 0x51))
	h := History{Config: Config{
		Machines: 1 + rng.IntN(2), Disks: 1 + rng.IntN(2), DiskSize: 256 << 10, Ring: 1 << 20, Memory: 32 << 20, SpoolLimit: 4 << 20,
		SegmentSize: []int64{64 << 10, 256 << 10}[rng.IntN(2)], History: []time.Duration{30 * time.Second, time.Hour}[rng.IntN(2)],
	}}
	total := 0
	for _, n := range weights {
		total += n
	}
	for range steps {
		n := rng.IntN(total)
		for k, weight := range weights {
			if n -= weight; n < 0 {
				h.Steps = append(h.Steps, Step{Kind(k), rng.Uint64()})
				break
			}
		}
	}
	h.Config.CompareEvery = []time.Duration{0, 2 * time.Second}[rng.IntN(2)]
	return h
}

// Result is what came of a history.
type Result struct {
	Err    error // the promise that was broken; nil: none
	Writes int
	Looks  int           // at positions
	Took   time.Duration // of the bubble's time
}

// Run plays a history. It must be called in a bubble of testing/synctest.
func Run(h History) (r Result) {
	begin := time.Now()
	w, err := newWorld(h.Config)
	if err != nil {
		return Result{Err: err}
	}
	for i, s := range h.Steps {
		w.take(s)
		w.sleep(time.Duration(s.N>>40%20) * time.Millisecond)
		if w.fault != nil {
			r.Err = fmt.Errorf("step %d, %v: %w", i, s, w.fault)
			break
		}
	}
	if w.fault == nil {
		rng := rand.New(rand.NewPCG(uint64(len(h.Steps)), 3))
		w.judge(rng.IntN)
		r.Err = w.fault
	}
	r.Took = time.Since(begin)
	if err := w.close(); err != nil && r.Err == nil {
		r.Err = err
	}
	for _, m := range w.machines {
		r.Writes += m.oracle.writes
		r.Looks += len(m.judged)
	}
	return r
}

// take does what a step says.
func (w *World) take(s Step) {
	rng := rand.New(rand.NewPCG(s.N, uint64(s.Kind)))
	m := w.machines[rng.IntN(len(w.machines))]
	switch s.Kind {
	case Write:
		m.writeSome(rng, 1+rng.IntN(8))
	case Burst:
		m.writeSome(rng, 50+rng.IntN(200))
	case Land:
		m.landSome(rng.IntN(3))
	case Tag:
		m.tag(byte(len(m.tags)))
	case Look:
		w.lookSomewhere(m, rng.IntN)
	case Wait:
		w.sleep(time.Duration(rng.IntN(1500)) * time.Millisecond)
	case KillAgent, RestartAgent, Reboot:
		w.agentStep(s.Kind, m, rng)
	case KillSource, PowerSource, KillTarget, PowerTarget, LoseSpool, FillSource, FillTarget:
		w.roleStep(s.Kind, rng)
	case CutLine, SlowLine, ResetLine, HalfOpenLine, Heal:
		w.lineStep(s.Kind, m, rng)
	case SmallRing:
		m.kernel.SetRing([]int64{4 << 10, 64 << 10}[rng.IntN(2)])
	}
}

// writeSome submits n writes; some land at once, others later.
func (m *machine) writeSome(rng *rand.Rand, n int) {
	for range n {
		d := m.disks[rng.IntN(len(m.disks))]
		length := int64(1+rng.IntN(16)) * dr.SectorSize
		x := dr.Extent{Disk: d.ID, Offset: rng.Int64N((d.Size-length)/dr.SectorSize+1) * dr.SectorSize, Length: length}
		what := dr.Data
		if k := rng.IntN(10); k == 0 {
			what = dr.Zero
		} else if k == 1 {
			what = dr.Discard
		}
		m.write(x, what, time.Duration(rng.IntN(3)))
	}
}

func (w *World) agentStep(k Kind, m *machine, rng *rand.Rand) {
	switch k {
	case KillAgent:
		m.kill()
	case RestartAgent:
		m.stop()
	default:
		m.reboot()
	}
	w.sleep(time.Duration(rng.IntN(1000)) * time.Millisecond)
	m.start()
}

func (w *World) roleStep(k Kind, rng *rand.Rand) {
	pause := time.Duration(rng.IntN(2000)) * time.Millisecond
	switch k {
	case KillSource:
		w.source.kill()
	case PowerSource:
		w.source.powerCut(rng.Uint64())
		w.source.node = nil
	case LoseSpool:
		w.source.kill()
		if err := w.source.disk.RemoveAll(spoolDir); err != nil {
			w.broken("lose the spool: %v", err)
		}
	case KillTarget:
		w.target.kill()
	case PowerTarget:
		w.target.powerCut(rng.Uint64())
		w.target.node = nil
	case FillSource:
		w.source.fill(true)
	case FillTarget:
		w.target.fill(true)
	}
	w.sleep(pause)
	w.source.fill(false)
	w.target.fill(false)
	if err := w.source.start(); err != nil {
		w.broken("the process server does not start: %v", err)
	}
	if err := w.target.start(); err != nil {
		w.broken("the master target does not start: %v", err)
	}
	w.assign()
}

func (w *World) lineStep(k Kind, m *machine, rng *rand.Rand) {
	if k == Heal {
		w.net.heal()
		return
	}
	line := w.net.line(m.name, w.source.name, m.peer)
	if rng.IntN(2) == 0 {
		line = w.net.line(w.source.name, w.target.name, w.source.peer)
	}
	switch k {
	case CutLine:
		line.Set(wan.Line{Cut: true})
	case SlowLine:
		line.Set(wan.Line{Rate: int64(20_000 + rng.IntN(200_000)), Delay: time.Duration(rng.IntN(100)) * time.Millisecond})
	case ResetLine:
		line.Reset()
	default:
		line.HalfOpen()
	}
}
