package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"farside/internal/capture"
	blocks "farside/internal/compare"
	"farside/internal/dr"
	"farside/internal/extent"
)

// comparer finds out by hashes what the far side lacks, and marks it in the source:
// the stream sends it as anything that is dirty. Each part of a disk is claimed, looked
// at (read and hashed) and settled (by the far side's answer). docs/agent.md has
// the argument why that is enough while writes go on.
//
// It is safe for concurrent use.
type comparer struct {
	src   capture.Source
	shift uint8    // of the blocks
	part  int64    // bytes that are asked for at a time
	read  int64    // bytes that are read at a time
	spare *sparing // what need not be read; nil: everything is

	// early ignores the floor, and lazy what differs: negative controls of the tests.
	early, lazy bool

	mu struct {
		sync.Mutex
		pass  *pass
		begun chan struct{} // closed and replaced when there is another pass
		fault error         // why the pass does not get on; nil if it does
	}
}

// pass compares some disks once.
type pass struct {
	floor dr.Position // where the stream began: an answer about less counts for nothing
	key   blocks.Key
	parts []dr.Extent // that nobody has claimed
	open  int         // parts that are not settled
	done  int64       // bytes that are
	total int64
	empty bool   // the far side holds zeroes: it is not asked
	free  spared // what is not read

	spared map[dr.DiskID]int64 // bytes of settled parts that were not marked, if empty
}

// part is a piece of a pass in somebody's hands.
type part struct {
	dr.Extent
	of   *pass
	req  *blocks.Request // after look
	free *extent.Set     // nil: nothing is

	spared int64 // bytes that markUsed did not mark
}

const (
	compareShift = 16 // blocks of 64 KiB: 16 bytes for each are 0.024 %
	comparePart  = 16 << 20
	compareRead  = 1 << 20
)

func newComparer(src capture.Source) *comparer {
	c := &comparer{src: src, shift: compareShift, part: comparePart, read: compareRead}
	c.mu.begun = make(chan struct{})
	return c
}

var _ comparing = (*comparer)(nil)

// Begin implements comparing.
func (c *comparer) Begin(from dr.Position, disks []dr.DiskID) error {
	p := &pass{floor: from}
	if c.early {
		p.floor.Seq = 0
	}
	return c.begin(p, disks)
}

func (c *comparer) begin(p *pass, disks []dr.DiskID) error {
	if p.spared = make(map[dr.DiskID]int64); c.spare != nil {
		p.free.by, p.free.kinds = c.spare, c.spare.asked(p.empty)
	}
	if _, err := rand.Read(p.key[:]); err != nil {
		return fmt.Errorf("make key of a comparison: %w", err)
	}
	for _, d := range c.src.Disks() {
		if !slices.Contains(disks, d.ID) {
			continue
		}
		for off := int64(0); off < d.Size; off += c.part {
			p.parts = append(p.parts, dr.Extent{Disk: d.ID, Offset: off, Length: min(c.part, d.Size-off)})
		}
		p.total += d.Size
	}
	p.open = len(p.parts)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.pass, c.mu.fault = p, nil
	close(c.mu.begun)
	c.mu.begun = make(chan struct{})
	return nil
}

// Done implements comparing.
func (c *comparer) Done() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.pass == nil || c.mu.pass.open == 0
}

// Progress implements comparing.
func (c *comparer) Progress() (done, total int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.pass == nil || c.mu.pass.empty {
		return 0, 0
	}
	return c.mu.pass.done, c.mu.pass.total
}

// Fault implements comparing.
func (c *comparer) Fault() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.fault
}

// claim returns the next part, or nil and what to wait for.
func (c *comparer) claim() (*part, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.mu.pass
	if p == nil || len(p.parts) == 0 {
		return nil, c.mu.begun
	}
	x := p.parts[0]
	p.parts = p.parts[1:]
	return &part{Extent: x, of: p}, nil
}

// look reads the part and hashes it. ready is called before each read of so many
// bytes; its error ends the work.
func (c *comparer) look(p *part, buf []byte, ready func(n int64) error) error {
	r := &blocks.Request{
		Disk: p.Disk, Shift: c.shift, Floor: p.of.floor, First: p.Offset >> c.shift, Length: p.Length, Key: p.of.key,
	}
	h := blocks.NewHasher(r.Key)
	for _, s := range stretches(p.free, p.Offset, p.Length, 1<<c.shift) {
		for off := s.off; off < s.end; off += c.read {
			n := min(c.read, s.end-off)
			if s.skip {
				for range (n + 1<<c.shift - 1) >> c.shift {
					r.Add(blocks.Skip, blocks.Sum{})
				}
				continue
			}
			if err := c.lookAt(r, h, off, buf[:n], ready); err != nil {
				return err
			}
		}
	}
	p.req = r
	return nil
}

// lookAt reads what fits into b and adds it to the request.
func (c *comparer) lookAt(r *blocks.Request, h *blocks.Hasher, off int64, b []byte, ready func(n int64) error) error {
	if err := ready(int64(len(b))); err != nil {
		return err
	}
	if _, err := c.src.ReadAt(b, r.Disk, off); err != nil {
		return fmt.Errorf("%w: disk %d at %d: %w", errRead, r.Disk, off, err)
	}
	for block := range slices.Chunk(b, 1<<c.shift) {
		if blocks.IsZero(block) {
			r.Add(blocks.Zero, blocks.Sum{})
		} else {
			r.Add(blocks.Data, h.Sum(block))
		}
	}
	return nil
}

// settle takes the far side's answer about a part, or the error instead, and reports
// whether the part is done; if not, somebody must claim it again. What can't be
// compared for good is marked as a whole: that is always right.
func (c *comparer) settle(p *part, answer []byte, err error) (bool, error) {
	switch {
	case err == nil && p.of.empty:
		err = c.markUsed(p)
	case err == nil:
		err = c.mark(p, answer)
	}
	if err != nil && !passing(err) {
		if merr := c.src.Mark(p.Extent); merr != nil {
			return false, c.giveBack(p, errors.Join(err, merr))
		}
		err = nil
	}
	if err != nil {
		return false, c.giveBack(p, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p.of.open--
	p.of.spared[p.Disk] += p.spared
	p.of.done += p.Length
	if c.mu.pass == p.of {
		c.mu.fault = nil
	}
	return true, nil
}

// passing reports whether asking again may help.
func passing(err error) bool {
	for _, kind := range []error{dr.ErrUnavailable, dr.ErrTimeline, errRead, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// giveBack makes a part one that nobody has claimed, and returns err.
func (c *comparer) giveBack(p *part, err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	p.of.parts = append(p.of.parts, p.Extent)
	if c.mu.pass == p.of && !errors.Is(err, context.Canceled) {
		c.mu.fault = err
	}
	return err
}

// mark marks the blocks that differ.
func (c *comparer) mark(p *part, answer []byte) error {
	a, err := blocks.ParseAnswer(p.req, answer)
	if err != nil {
		return err
	}
	if c.lazy {
		return nil
	}
	for i := 0; i < a.Blocks(); i++ {
		if !a.Differs(i) {
			continue
		}
		x := p.req.Block(i)
		for ; i+1 < a.Blocks() && a.Differs(i+1); i++ {
			x.Length += p.req.Block(i + 1).Length
		}
		if err := c.src.Mark(x); err != nil {
			return fmt.Errorf("mark %v: %w", x, err)
		}
	}
	return nil
}

// asking carries a request to the far side and returns the answer. Errors wrap
// dr.ErrUnavailable if there is no link, and those of docs/format/compare.md.
type asking func(ctx context.Context, body []byte) ([]byte, error)

const (
	// compareWorkers parts are under way at a time: reads, hashes and answers overlap.
	compareWorkers = 4
	// compareRetry is the pause after a part could not be compared.
	compareRetry = 200 * time.Millisecond
	// compareYield is the pause while captured writes need the room.
	compareYield = 5 * time.Millisecond
)

// run compares what passes ask for until ctx ends. busy says that captured writes wait: then
// nothing is read. rate bounds what is read, in bytes a second; 0 means no bound.
func (c *comparer) run(ctx context.Context, ask asking, busy func() bool, rate int64) error {
	var wg sync.WaitGroup
	pace := &pacer{rate: rate}
	for range compareWorkers {
		wg.Go(func() { c.work(ctx, ask, busy, pace) })
	}
	wg.Wait()
	return ctx.Err()
}

func (c *comparer) work(ctx context.Context, ask asking, busy func() bool, pace *pacer) {
	ready := func(n int64) error {
		for busy() && ctx.Err() == nil {
			sleep(ctx, compareYield, nil)
		}
		sleep(ctx, pace.wait(n, time.Now()), nil)
		return ctx.Err()
	}
	var buf []byte
	for ctx.Err() == nil {
		p, begun := c.claim()
		if p == nil {
			buf = nil // for days, perhaps
			sleep(ctx, time.Hour, begun)
			continue
		}
		if buf == nil {
			buf = make([]byte, c.read)
		}
		p.free = p.of.free.of(ctx, c.src, p.Disk)
		answer, err := c.treat(ctx, p, buf, ready, ask)
		if done, _ := c.settle(p, answer, err); !done {
			sleep(ctx, compareRetry, nil)
		}
	}
}

// treat looks at a part and returns the far side's answer about it.
func (c *comparer) treat(ctx context.Context, p *part, buf []byte, ready func(n int64) error, ask asking) ([]byte, error) {
	if p.of.empty {
		return nil, ctx.Err() // nothing is read now: settle marks what is used
	}
	if err := c.look(p, buf, ready); err != nil {
		return nil, err
	}
	return c.askFor(ctx, p, ask)
}

// askFor asks until there is an answer, an error that stays, or another pass. What was
// read keeps its worth meanwhile: it need only be newer than the pass.
func (c *comparer) askFor(ctx context.Context, p *part, ask asking) ([]byte, error) {
	b, err := p.req.Encode()
	if err != nil {
		return nil, err
	}
	for pause := compareRetry; ; pause = min(2*pause, maxRetry) {
		answer, err := ask(ctx, b)
		if err == nil || !passing(err) || ctx.Err() != nil || !c.stuck(p, err) {
			return answer, err
		}
		sleep(ctx, pause, nil)
	}
}

// stuck notes why a part can't be compared now, and reports whether its pass still
// counts.
func (c *comparer) stuck(p *part, why error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.pass != p.of {
		return false
	}
	c.mu.fault = why
	return true
}

// pacer spreads reads over time. It is safe for concurrent use.
type pacer struct {
	rate int64 // bytes a second; 0: no bound

	mu struct {
		sync.Mutex
		free time.Time // when everything that was let through is within the rate
	}
}

// wait returns how long to wait before n bytes are read.
func (p *pacer) wait(n int64, now time.Time) time.Duration {
	if p.rate == 0 {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.free.Before(now) {
		p.mu.free = now
	}
	pause := p.mu.free.Sub(now)
	p.mu.free = p.mu.free.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	return pause
}
