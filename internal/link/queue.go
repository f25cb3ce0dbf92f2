package link

import (
	"context"
	"sync"

	"farside/internal/frame"
)

// queueBytes bounds what was read and is not appended yet.
const queueBytes = 16 << 20

// queue passes frames, in order, from the goroutine that reads them to the one
// that appends them, so that reading goes on during an append. It is bounded by
// bytes; a frame alone always fits.
type queue struct {
	mu struct {
		sync.Mutex
		frames  []*frame.Frame
		bytes   int64         // of them
		taken   int64         // bytes of the group that is being appended
		ended   bool          // nothing more comes
		failed  error         // what comes is dropped, because of it
		changed chan struct{} // closed and replaced at each change
	}
}

func newQueue() *queue {
	q := &queue{}
	q.mu.changed = make(chan struct{})
	return q
}

func (q *queue) notifyLocked() {
	close(q.mu.changed)
	q.mu.changed = make(chan struct{})
}

// wait calls try until it reports true, at first and after each change.
func (q *queue) wait(ctx context.Context, try func() bool) error {
	for {
		q.mu.Lock()
		ok, changed := try(), q.mu.changed
		q.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// put adds a frame; it waits for room.
func (q *queue) put(ctx context.Context, f *frame.Frame) error {
	return q.wait(ctx, func() bool {
		held := q.mu.bytes + q.mu.taken
		switch {
		case q.mu.failed != nil:
			return true
		case held > 0 && held+f.Size() > queueBytes:
			return false
		}
		q.mu.frames = append(q.mu.frames, f)
		q.mu.bytes += f.Size()
		q.notifyLocked()
		return true
	})
}

// take returns all frames that are there, up to the bounds of a group; it waits
// for one. The group counts until the next take. It returns nil at the end.
func (q *queue) take(ctx context.Context) (group []*frame.Frame, err error) {
	err = q.wait(ctx, func() bool {
		if q.mu.taken > 0 {
			q.mu.taken = 0
			q.notifyLocked()
		}
		n := 0
		for n < len(q.mu.frames) && n < groupFrames && (n == 0 || q.mu.taken < groupBytes) {
			q.mu.taken += q.mu.frames[n].Size()
			n++
		}
		group = q.mu.frames[:n:n]
		q.mu.frames = q.mu.frames[n:]
		q.mu.bytes -= q.mu.taken
		return n > 0 || q.mu.ended
	})
	return group, err
}

// end says that nothing more comes, and waits until all was taken and appended.
// It returns the error of drop.
func (q *queue) end(ctx context.Context) (failed error) {
	q.mu.Lock()
	q.mu.ended = true
	q.notifyLocked()
	q.mu.Unlock()
	_ = q.wait(ctx, func() bool {
		failed = q.mu.failed
		return failed != nil || q.mu.bytes+q.mu.taken == 0
	})
	return failed
}

// drop drops what is there and what comes.
func (q *queue) drop(because error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.mu.failed, q.mu.frames, q.mu.bytes, q.mu.taken = because, nil, 0, 0
	q.notifyLocked()
}
