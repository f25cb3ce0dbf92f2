package mastertarget

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"farside/internal/compare"
	"farside/internal/dr"
	"farside/internal/link"
	"farside/internal/vault"
)

// Connected implements link.CallSink: nothing is asked of the sending side.
func (k *sink) Connected(*link.Caller) {}

// Handle implements link.CallSink. It ends with the connection, before the vault
// can be closed.
func (k *sink) Handle(ctx context.Context, kind link.CallKind, body []byte) ([]byte, error) {
	if kind != link.CallCompare {
		return nil, fmt.Errorf("call of kind %d: %w", kind, dr.ErrUnsupported)
	}
	a, err := k.m.compare(ctx, body)
	if err != nil {
		return nil, fmt.Errorf("compare: %w", err)
	}
	return a.Encode(), nil
}

// compare answers a request from what is durable.
func (m *machine) compare(ctx context.Context, body []byte) (*compare.Answer, error) {
	r, err := compare.ParseRequest(body)
	if err != nil {
		return nil, err
	}
	state, err := m.vault.Newest()
	if err != nil {
		return nil, err
	}
	defer state.Close()
	at := state.Point().Position
	switch {
	case at.Timeline != r.Floor.Timeline:
		return nil, fmt.Errorf("timeline %d, current is %d: %w", r.Floor.Timeline, at.Timeline, dr.ErrTimeline)
	case at.Seq < r.Floor.Seq:
		return nil, fmt.Errorf("the vault stands at %v, before %v: %w", at, r.Floor, dr.ErrUnavailable)
	}
	c := comparison{Request: r, state: state, answer: compare.NewAnswer(at, r.Blocks())}
	if err := c.known(); err != nil {
		return nil, err
	}
	if err := c.read(ctx, m.hash); err != nil {
		return nil, err
	}
	return c.answer, nil
}

// comparison is the work on one request.
type comparison struct {
	*compare.Request
	state *vault.State
	todo  []job // what must be read

	mu     sync.Mutex // of answer while jobs run
	answer *compare.Answer
}

// job is some blocks of a request, one behind the other.
type job struct {
	from, to int // blocks
	sum      int // number of the first one's hash
}

// jobBytes is how much one job reads, unless a block is larger.
const jobBytes = 1 << 20

// known answers what the vault knows without reading, and makes jobs of the rest.
func (c *comparison) known() error {
	zero := make([]bool, c.Blocks())
	err := c.state.Map(c.Disk, c.Offset(), c.Length, func(off, n int64, isZero bool) bool {
		if !isZero {
			return true
		}
		// Only blocks that lie within the range wholly.
		for i := (off - c.Offset() + 1<<c.Shift - 1) >> c.Shift; i < int64(len(zero)); i++ {
			if c.Block(int(i)).End() > off+n {
				break
			}
			zero[i] = true
		}
		return true
	})
	if err != nil {
		return err
	}
	sum, most := 0, max(1, jobBytes>>c.Shift)
	for i, kind := range c.Kinds {
		switch {
		case kind == compare.Skip:
		case zero[i]:
			if kind == compare.Data {
				c.answer.Set(i)
			}
		default:
			c.plan(i, sum, most)
		}
		if kind == compare.Data {
			sum++
		}
	}
	return nil
}

// plan adds block i to the last job, or to a new one.
func (c *comparison) plan(i, sum, most int) {
	if n := len(c.todo); n > 0 && c.todo[n-1].to == i && i-c.todo[n-1].from < most {
		c.todo[n-1].to++
		return
	}
	c.todo = append(c.todo, job{i, i + 1, sum})
}

// read does the jobs, as many at a time as there is room for.
func (c *comparison) read(ctx context.Context, room chan struct{}) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(cap(room))
	for _, j := range c.todo {
		g.Go(func() error {
			select {
			case room <- struct{}{}:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			defer func() { <-room }()
			return c.do(j)
		})
	}
	return g.Wait()
}

// jobBuffers holds the memory of jobs: there are never more in use than may run.
var jobBuffers = sync.Pool{New: func() any { b := make([]byte, max(jobBytes, 1<<compare.MaxShift)); return &b }}

func (c *comparison) do(j job) error {
	buf := jobBuffers.Get().(*[]byte)
	defer jobBuffers.Put(buf)
	first := c.Block(j.from)
	b := (*buf)[:c.Block(j.to-1).End()-first.Offset]
	if err := c.state.ReadAt(b, c.Disk, first.Offset); err != nil {
		return err
	}
	h, sum := compare.NewHasher(c.Key), j.sum
	for i := j.from; i < j.to; i++ {
		x := c.Block(i)
		block := b[x.Offset-first.Offset:][:x.Length]
		same := false
		if c.Kinds[i] == compare.Data {
			same = h.Sum(block) == c.Sums[sum]
			sum++
		} else {
			same = compare.IsZero(block)
		}
		if !same {
			c.mu.Lock()
			c.answer.Set(i)
			c.mu.Unlock()
		}
	}
	return nil
}
