package tap

import "sync"

// rangeLock excludes changes of one disk that overlap. There are as many held
// ranges as writers, so a list is enough.
type rangeLock struct {
	mu struct {
		sync.Mutex
		held map[*heldRange]struct{}
	}
}

type heldRange struct {
	start, end int64
	free       chan struct{} // closed when unlocked
}

// lock waits until nobody holds a part of [start, end) and holds it.
func (l *rangeLock) lock(start, end int64) *heldRange {
	h := &heldRange{start: start, end: end, free: make(chan struct{})}
	for {
		other := l.try(h)
		if other == nil {
			return h
		}
		<-other.free
	}
}

// try holds h or returns one that is in its way.
func (l *rangeLock) try(h *heldRange) *heldRange {
	l.mu.Lock()
	defer l.mu.Unlock()
	for o := range l.mu.held {
		if o.start < h.end && h.start < o.end {
			return o
		}
	}
	if l.mu.held == nil {
		l.mu.held = map[*heldRange]struct{}{}
	}
	l.mu.held[h] = struct{}{}
	return nil
}

func (l *rangeLock) unlock(h *heldRange) {
	l.mu.Lock()
	delete(l.mu.held, h)
	l.mu.Unlock()
	close(h.free)
}
