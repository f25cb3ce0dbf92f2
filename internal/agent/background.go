package agent

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"sync"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/capture"
	blocks "farside/internal/compare"
	"farside/internal/dr"
)

// background compares the disks of an exact stream with what the far side holds, slowly and for ever: that
// finds what no hook sees, such as the buffer of a direct write that was changed while it was written. It
// opens no sync before it is sure. It outlives streams; one at a time runs it.
type background struct {
	every time.Duration // that a pass over all disks takes; 0: there are none
	keep  func(*passes) // notes where it stands; may be nil

	// rash takes the first difference for real: the negative control of the tests.
	rash bool

	mu struct {
		sync.Mutex
		passes passes
	}
}

// passes is how far the background comparison has come, and what it found. It is kept from one agent to
// the next, and worth no more than that: a wrong one makes a pass longer or shorter.
type passes struct {
	Disk   dr.DiskID `json:"disk"`   // where the pass stands …
	Offset int64     `json:"offset"` // … in bytes; what is before has been compared
	Began  time.Time `json:"began"`  // zero: no pass has begun
	Done   int64     `json:"done"`   // bytes that it has compared
	Found  int64     `json:"found"`  // blocks that differ in earnest, of this pass
	Last   fullPass  `json:"last"`   // zero: none has ended
}

// fullPass is a pass that has ended.
type fullPass struct {
	Began time.Time `json:"began"`
	Ended time.Time `json:"ended"`
	Found int64     `json:"found"` // blocks
}

const (
	// glanceBytes are looked at together: the replicator closes one frame for them.
	glanceBytes = 1 << 20
	// A difference is looked at again after such pauses. It is real if it is there so often while nothing was
	// written to the block: a write that is on its way to the disk for longer than that is rare, and then nothing worse
	// comes of it than a block that is sent twice.
	suspectPause = 2 * time.Second
	suspectLooks = 2
	// suspectTries bounds how often a block that is written each time is looked at: the next pass will see it again.
	suspectTries = 20
	// maxSuspects bounds what is remembered. More of them are no accident: everything is compared.
	maxSuspects = 1024
	// backgroundLeast is how fast a pass is at least, in bytes per second: small disks are compared more often.
	backgroundLeast = 256 << 10
	// durableWait is how long a glance waits for the far side to have what was captured before it.
	durableWait = 10 * time.Second
	// backgroundRest is the pause while the stream is not exact, or busy.
	backgroundRest = time.Second
)

// suspect is a block that differed.
type suspect struct {
	dr.Extent
	looks int // at which it differed, one after the other, without being written in between
	tries int // looks at all
	due   time.Time
}

// passesFile is where an agent keeps how far it has come, for the next one.
const passesFile = "background.json"

// newBackground returns the background comparison of an agent, which goes on where the one before stood.
func newBackground(every time.Duration, k keeper, log *slog.Logger) *background {
	b := &background{every: every}
	b.keep = func(p *passes) {
		text, err := json.Marshal(p)
		if err == nil {
			err = k.Keep(passesFile, append(text, '\n'))
		}
		if err != nil {
			log.Warn("the background comparison may begin anew after a restart", "error", err)
		}
	}
	text, err := k.Kept(passesFile)
	if err == nil {
		b.mu.passes, err = parsePasses(text)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("the background comparison begins anew: what was kept of it can't be read", "error", err)
	}
	return b
}

// parsePasses reads what was kept; what it returns is none that anybody has to be afraid of.
func parsePasses(text []byte) (p passes, err error) {
	if len(text) > maxRecord {
		return p, fmt.Errorf("state of %d bytes: %w", len(text), dr.ErrCorrupt)
	}
	if err := json.Unmarshal(text, &p); err != nil {
		return passes{}, fmt.Errorf("state: %w: %w", err, dr.ErrCorrupt)
	}
	if min(p.Offset, p.Done, p.Found, p.Last.Found) < 0 {
		return passes{}, fmt.Errorf("state with negative numbers: %w", dr.ErrCorrupt)
	}
	return p, nil
}

// state returns how far it has come.
func (b *background) state() passes {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mu.passes
}

// report describes it for disks.
func (b *background) report(disks []diskStatus) *pb.BackgroundCompare {
	if b == nil {
		return nil
	}
	at := b.state()
	r := &pb.BackgroundCompare{BytesDone: at.Done, BeganNs: ns(at.Began), Found: at.Found}
	for _, d := range disks {
		r.BytesTotal += d.Size
	}
	r.BytesPerSecond = b.rate(r.BytesTotal)
	r.LastBeganNs, r.LastEndedNs, r.LastFound = ns(at.Last.Began), ns(at.Last.Ended), at.Last.Found
	return r
}

func ns(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// rate returns the pace in bytes per second for disks of so many bytes together.
func (b *background) rate(total int64) int64 {
	if b.every <= 0 {
		return 0
	}
	return max(backgroundLeast, int64(float64(total)/b.every.Seconds()))
}

// patrol is a background comparison of one stream.
type patrol struct {
	*background
	stream   *stream
	ask      asking
	disks    []capture.Disk
	total    int64
	key      blocks.Key
	buf      []byte
	free     spared
	suspects []suspect
	now      func() time.Time
}

// patrolling runs the background comparison until ctx ends.
func (s *stream) patrolling(ctx context.Context) error {
	if s.background == nil || s.background.every <= 0 {
		<-ctx.Done()
		return ctx.Err()
	}
	p := &patrol{
		background: s.background, stream: s, ask: s.askFar, disks: s.src.Disks(), buf: make([]byte, glanceBytes), now: time.Now,
	}
	for _, d := range p.disks {
		p.total += d.Size
	}
	if _, err := rand.Read(p.key[:]); err != nil {
		return fmt.Errorf("make key of the background comparison: %w", err)
	}
	if c := s.comparer; c.spare != nil {
		p.free.by, p.free.kinds = c.spare, c.spare.kinds
	}
	pace := &pacer{rate: p.rate(p.total)}
	for ctx.Err() == nil {
		if !p.ready() {
			sleep(ctx, backgroundRest, nil)
			continue
		}
		if err := p.review(ctx); err != nil {
			return err
		}
		x := p.next()
		if x.Length == 0 { // no disk has a byte
			sleep(ctx, time.Hour, nil)
			continue
		}
		sleep(ctx, pace.wait(x.Length, time.Now()), nil)
		differ, err := p.look(ctx, x, func(*vigil, []dr.Extent) {})
		if err != nil {
			sleep(ctx, backgroundRest, nil)
			continue
		}
		if err := p.note(ctx, differ); err != nil {
			return err
		}
		p.advance(x)
	}
	return ctx.Err()
}

// ready reports whether the stream is exact and has time.
func (p *patrol) ready() bool {
	p.stream.mu.Lock()
	exact := p.stream.mu.status.phase == Exact
	p.stream.mu.Unlock()
	return exact && !p.stream.busy()
}

// next returns what is to be looked at; the pass begins anew behind the last disk, and where it stood is of a disk
// that is not there.
func (p *patrol) next() dr.Extent {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := &p.mu.passes
	for i, d := range p.disks {
		if d.ID != at.Disk || at.Began.IsZero() {
			continue
		}
		if at.Offset >= 0 && at.Offset < d.Size {
			off := at.Offset &^ (glanceBytes - 1)
			return dr.Extent{Disk: d.ID, Offset: off, Length: min(glanceBytes, d.Size-off)}
		}
		if i+1 < len(p.disks) {
			at.Disk, at.Offset = p.disks[i+1].ID, 0
			return dr.Extent{Disk: at.Disk, Length: min(glanceBytes, p.disks[i+1].Size)}
		}
	}
	*at = passes{Began: p.now(), Last: at.Last, Found: at.Found} // what was found since the last one ended counts
	if len(p.disks) == 0 {
		return dr.Extent{}
	}
	at.Disk = p.disks[0].ID
	return dr.Extent{Disk: at.Disk, Length: min(glanceBytes, p.disks[0].Size)}
}

// advance notes that x was looked at, and ends the pass if it was the last of it.
func (p *patrol) advance(x dr.Extent) {
	p.mu.Lock()
	at := &p.mu.passes
	at.Disk, at.Offset = x.Disk, x.End()
	at.Done += x.Length
	last := p.disks[len(p.disks)-1]
	if x.Disk == last.ID && x.End() == last.Size {
		at.Last = fullPass{Began: at.Began, Ended: p.now(), Found: at.Found}
		at.Began, at.Done, at.Found = time.Time{}, 0, 0
	}
	state := *at
	p.mu.Unlock()
	if p.keep != nil && (state.Began.IsZero() || state.Done%(64*glanceBytes) == 0) {
		p.keep(&state)
	}
}

// look returns which blocks of x differ. then is called behind all that was submitted before the answer came.
func (p *patrol) look(ctx context.Context, x dr.Extent, then func(v *vigil, differ []dr.Extent)) (differ []dr.Extent, err error) {
	g, err := p.stream.beginGlance(ctx)
	if err != nil {
		return nil, err
	}
	answer, req, err := p.compare(ctx, g, x)
	if err != nil {
		return nil, err
	}
	for i := range answer.Blocks() {
		if answer.Differs(i) {
			differ = append(differ, req.Block(i))
		}
	}
	return differ, p.stream.endGlance(ctx, g, func(v *vigil) { then(v, differ) })
}

// compare reads and hashes x and asks the far side.
func (p *patrol) compare(ctx context.Context, g *glance, x dr.Extent) (*blocks.Answer, *blocks.Request, error) {
	c := p.stream.comparer
	part := &part{Extent: x, of: &pass{floor: g.floor, key: p.key}, free: p.free.of(ctx, c.src, x.Disk)}
	if err := c.look(part, p.buf, func(int64) error { return ctx.Err() }); err != nil {
		return nil, nil, err
	}
	b, err := part.req.Encode()
	if err != nil {
		return nil, nil, err
	}
	for until := time.Now().Add(durableWait); p.stream.out.durable() < g.floor.Seq; {
		if time.Now().After(until) {
			return nil, nil, fmt.Errorf("the far side is behind: %w", dr.ErrUnavailable)
		}
		sleep(ctx, compareYield, nil)
		if ctx.Err() != nil {
			return nil, nil, ctx.Err()
		}
	}
	text, err := p.ask(ctx, b)
	if err != nil {
		return nil, nil, err
	}
	a, err := blocks.ParseAnswer(part.req, text)
	return a, part.req, err
}

// note remembers blocks that differ, to look at them again.
func (p *patrol) note(ctx context.Context, differ []dr.Extent) error {
	if p.rash {
		return p.found(ctx, differ)
	}
	for _, x := range differ {
		if slices.ContainsFunc(p.suspects, func(s suspect) bool { return s.Extent == x }) {
			continue
		}
		if len(p.suspects) >= maxSuspects {
			p.suspects = nil
			p.stream.compare(ReasonBackground)
			return nil
		}
		p.suspects = append(p.suspects, suspect{Extent: x, due: p.now().Add(suspectPause)})
	}
	return nil
}

// review looks again at the blocks whose time has come, and repairs those that differ in earnest.
func (p *patrol) review(ctx context.Context) error {
	var left []suspect
	var real []dr.Extent
	for _, s := range p.suspects {
		if p.now().Before(s.due) {
			left = append(left, s)
			continue
		}
		p.lookAgain(ctx, &s)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the caller sees that ctx has ended
		}
		switch {
		case s.looks >= suspectLooks:
			real = append(real, s.Extent)
		case s.tries < suspectTries:
			left = append(left, s)
		}
	}
	p.suspects = left
	return p.found(ctx, real)
}

// lookAgain looks at a suspect once more. One that does not differ any more has no tries left.
func (p *patrol) lookAgain(ctx context.Context, s *suspect) {
	s.due = p.now().Add(suspectPause)
	s.tries++
	differ, err := p.look(ctx, s.Extent, func(v *vigil, differ []dr.Extent) {
		switch {
		case len(differ) == 0:
			v.forget(s.Extent)
		case s.tries == 1 || v.take(s.Extent): // what is written now may be on its way for a while
			v.watch(s.Extent)
			s.looks = 0
		default:
			s.looks++
		}
		if s.looks >= suspectLooks || s.tries >= suspectTries {
			v.forget(s.Extent)
		}
	})
	if err != nil {
		s.looks = 0 // something may have been missed
	} else if len(differ) == 0 {
		s.tries = suspectTries
	}
}

// found tells of blocks that differ in earnest and has them sent again.
func (p *patrol) found(ctx context.Context, real []dr.Extent) error {
	if len(real) == 0 {
		return nil
	}
	p.mu.Lock()
	p.mu.passes.Found += int64(len(real))
	p.mu.Unlock()
	p.stream.notices.add(notice{string(ReasonBackground), true, fmt.Sprintf(
		"%d blocks of 64 KiB differed from the copy though nothing seemed to write them, the first on disk %d at %d: they are sent again. "+
			"A program that changes the buffer of a direct write while it is written does that; so does who writes past the disk's driver",
		len(real), real[0].Disk, real[0].Offset), p.now()})
	p.stream.news()
	err := p.stream.repair(ctx, ReasonBackground, real)
	if ctx.Err() != nil {
		return nil //nolint:nilerr // the caller sees that ctx has ended
	}
	return err
}
