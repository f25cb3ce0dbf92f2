package tap

import (
	"sync/atomic"

	"farside/internal/capture"
)

// queue is the buffer between writers and consumer: a ring of events and a ring
// of bytes for their data, both of fixed size.
//
// Slots in [head, tail) hold events. Writers own a slot from push until they
// set ready; the consumer owns the ready slots at head. Their data lies in the
// byte ring in the same order, each event's in one piece:
//
//	| free | data of head ... | data of tail-1 | skipped: too short for the next |
//
// The owner's mutex guards everything but the contents of slots.
type queue struct {
	slots      []slot
	bytes      []byte
	head, tail uint64 // events that ever left and came
	freed      uint64 // bytes that ever left, as positions modulo len(bytes)
	used       uint64 // bytes that ever came, including skipped ones
}

type slot struct {
	ev    capture.Event
	end   uint64 // freed advances to here when the event leaves
	ready atomic.Bool
}

// newQueue makes a queue for size bytes of data. Every event also takes a slot,
// of which one is kept back for a Lost.
func newQueue(size int64) *queue {
	return &queue{slots: make([]slot, max(64, size/1024)), bytes: make([]byte, size)}
}

// mark and reset undo pushes that came after it.
type mark struct{ tail, used uint64 }

func (q *queue) mark() mark { return mark{q.tail, q.used} }

func (q *queue) reset(m mark) { q.tail, q.used = m.tail, m.used }

// push adds an event with room for n bytes of data. It returns nil if there is
// none. last may use the slot that is kept back.
func (q *queue) push(ev capture.Event, n int, last bool) *slot {
	free := uint64(len(q.slots)) - (q.tail - q.head)
	if free == 0 || free == 1 && !last {
		return nil
	}
	size := uint64(len(q.bytes))
	used := q.used
	if at := used % size; at+uint64(n) > size {
		used += size - at // in one piece or not at all
	}
	if n > 0 && used+uint64(n)-q.freed > size {
		return nil
	}
	s := &q.slots[q.tail%uint64(len(q.slots))]
	s.ready.Store(false)
	s.ev = ev
	if n > 0 {
		at := used % size
		s.ev.Data = q.bytes[at : at+uint64(n) : at+uint64(n)]
		q.used = used + uint64(n)
	}
	s.end = q.used
	q.tail++
	return s
}

// first returns the oldest event if its data is there.
func (q *queue) first() *slot {
	if q.head == q.tail {
		return nil
	}
	s := &q.slots[q.head%uint64(len(q.slots))]
	if !s.ready.Load() {
		return nil
	}
	return s
}

// pop frees the oldest event.
func (q *queue) pop() {
	s := &q.slots[q.head%uint64(len(q.slots))]
	q.freed = s.end
	s.ev = capture.Event{}
	q.head++
}

func (q *queue) inUse() int64 { return int64(q.used - q.freed) }
