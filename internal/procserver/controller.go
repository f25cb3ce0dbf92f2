package procserver

import (
	"math"
	"time"

	"farside/internal/frame"
)

// The constants of the controller. docs/controller.md derives each of them.
const (
	tickEvery   = 250 * time.Millisecond // between two decisions
	rateMemory  = 2 * time.Second        // time constant of measured rates
	behindAfter = 2 * time.Second        // age of the backlog at which a stream is behind
	aheadBelow  = time.Second / 2        // age below which it may count as caught up …
	aheadFor    = 5 * time.Second        // … once it has been there for so long
	patience    = 5 * time.Second        // a backlog that clears by itself in that time is not folded
	foldLead    = 2 * time.Second        // of sending left before the run when it is folded
	foldLeast   = time.Second            // of sending: less is not worth a fold
	foldPause   = time.Second            // between two folds of a stream, and between two cuts
	frameTime   = time.Second / 2        // of sending that a merged frame takes, at most
	spaceShare  = 0.5                    // of the spool's limit, from which on it is folded for room
	spaceRun    = 0.125                  // of the spool's limit, that must be there to be folded then
	busyMost    = 0.75                   // share of the compression workers' time: above, less work per byte
	busyLeast   = 0.25                   // below, more work per byte is affordable
	levelSettle = 2 * time.Second        // between two steps of compression
	levelNormal = frame.ZstdFastest      // when neither link nor CPU is short
)

// measures are what a controller goes by. Bytes that count up do so from the
// start of the stream.
type measures struct {
	now       time.Time
	connected bool          // to the master target
	stored    int64         // bytes put into the spool
	sent      int64         // bytes sent that are durable
	backlog   int64         // bytes that are not durable
	age       time.Duration // of the oldest of them, since it was stored here
	ahead     int64         // bytes to be sent before what can be folded
	foldable  int64         // bytes that can be folded
	used      int64         // bytes of the spool
	limit     int64         // of used; 0 means none
	busy      float64       // share of the workers' time that went into compression
}

// settings are what a controller decides.
type settings struct {
	behind    bool
	cut       bool // begin a fresh segment: what comes from now on can be folded
	fold      bool
	level     frame.Compression
	frameData int // bytes of data of a merged frame
}

// controller decides for one stream how hard to compress, when to fold and into
// what frames. It is pure: time and measures come in, settings go out.
type controller struct {
	adaptive bool // else the level stays as it is
	level    frame.Compression
	levelAt  time.Time

	last     measures
	inRate   float64 // bytes per second into the spool
	linkRate float64 // bytes per second that the link can do, as far as seen

	behind   bool
	since    time.Time // when behind last changed
	goodFrom time.Time // since when the age has been low
	busyFrom time.Time // since when the link has had more to send than it could
	foldedAt time.Time
	cutAt    time.Time
	useless  int64 // bytes foldable when folding gained nothing: wait for twice as much
}

// newController returns the controller of a stream whose frames are stored by a
// codec; only zstd is adaptive.
func newController(codec frame.Codec) *controller {
	return &controller{adaptive: codec == frame.Zstd, level: codec.Compression()}
}

// next decides.
func (c *controller) next(m measures) settings {
	if c.last.now.IsZero() {
		c.last, c.since, c.levelAt, c.busyFrom = m, m.now, m.now, m.now
	}
	c.measure(m)
	c.judge(m)
	c.last = m
	c.chooseLevel(m)
	s := settings{behind: c.behind, level: c.level, frameData: c.frameData()}
	// At the first sign of lag, lest the segment that is being sent grows: it can't be folded.
	if m.age >= aheadBelow && m.ahead > 0 && m.foldable == 0 && m.now.Sub(c.cutAt) >= foldPause {
		s.cut, c.cutAt = true, m.now
	}
	if m.now.Sub(c.foldedAt) >= foldPause && c.shouldFold(m) {
		s.fold, c.foldedAt = true, m.now
	}
	return s
}

// measure brings the rates up to date.
func (c *controller) measure(m measures) {
	dt := m.now.Sub(c.last.now)
	if dt <= 0 {
		return
	}
	share := 1 - math.Exp(-float64(dt)/float64(rateMemory))
	c.inRate += share * (float64(m.stored-c.last.stored)/dt.Seconds() - c.inRate)
	got := float64(m.sent-c.last.sent) / dt.Seconds()
	if !m.connected || m.backlog == 0 {
		c.busyFrom = m.now
	}
	switch {
	case !m.connected:
	case m.backlog > 0 && c.last.backlog > 0: // it was busy: that is what it can do
		c.linkRate += share * (got - c.linkRate)
	case got > c.linkRate: // it was idle some of the time, and did that much
		c.linkRate = got
	}
}

// judge tells whether the stream is behind, with hysteresis.
func (c *controller) judge(m measures) {
	if m.age >= aheadBelow {
		c.goodFrom = time.Time{}
	} else if c.goodFrom.IsZero() {
		c.goodFrom = m.now
	}
	switch {
	case !c.behind && m.age >= behindAfter:
		c.behind, c.since = true, m.now
	case c.behind && !c.goodFrom.IsZero() && m.now.Sub(c.goodFrom) >= aheadFor:
		c.behind, c.since, c.useless = false, m.now, 0
	}
}

// clears returns how long it takes until all that is stored has been sent.
func (c *controller) clears(m measures) time.Duration {
	if m.backlog == 0 {
		return 0
	}
	spare := c.linkRate - c.inRate
	if !m.connected || spare <= 0 {
		return math.MaxInt64
	}
	return seconds(float64(m.backlog) / spare)
}

// seconds converts to a duration without overflow.
func seconds(s float64) time.Duration {
	if s >= math.MaxInt64/float64(time.Second) {
		return math.MaxInt64
	}
	return time.Duration(s * float64(time.Second))
}

func (c *controller) shouldFold(m measures) bool {
	if m.foldable < 2*c.useless {
		return false
	}
	if limit := float64(m.limit); limit > 0 && float64(m.used) >= spaceShare*limit && float64(m.foldable) >= spaceRun*limit {
		return true
	}
	known := m.now.Sub(c.busyFrom) >= rateMemory // what the link can do now
	return c.behind && known && c.clears(m) > patience &&
		float64(m.ahead) <= c.linkRate*foldLead.Seconds() &&
		float64(m.foldable) >= c.linkRate*foldLeast.Seconds()
}

// folded tells what became of a fold of so many bytes.
func (c *controller) folded(before, gained int64) {
	c.useless = 0
	if gained <= 0 {
		c.useless = before
	}
}

// frameData keeps a merged frame so short that it does not hold the link for long.
func (c *controller) frameData() int {
	return int(min(max(c.linkRate*frameTime.Seconds(), frame.BlockSize), frame.MaxRaw))
}

// chooseLevel steps the compression up or down by one, at most every levelSettle.
func (c *controller) chooseLevel(m measures) {
	if !c.adaptive || m.now.Sub(c.levelAt) < levelSettle {
		return
	}
	least, want := frame.Plain, levelNormal
	if c.behind { // every byte counts, except where the CPU holds everything up
		least, want = frame.S2Fast, frame.MostCompression
	}
	switch {
	case m.busy > busyMost && c.level > least:
		c.level--
	case m.busy < busyLeast && c.level < want:
		c.level++
	case c.level > want:
		c.level--
	default:
		return
	}
	c.levelAt = m.now
}
