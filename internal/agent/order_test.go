package agent

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// obeyed plays the replicator for an order: it sees it, and places it after a while.
func obeyed(s *stream, q *tagQueue, after time.Duration) {
	s.mu.Lock()
	for _, o := range s.mu.orders {
		q.obey(o)
	}
	s.mu.orders = nil
	s.mu.Unlock()
	time.Sleep(after)
	q.count = len(q.wanted)
	for _, w := range q.take() {
		if w.order.claim() {
			q.place(w, dr.Position{Timeline: 1, Seq: 7})
		}
	}
}

// Either the tag is placed and its position returned, or it never is.
func TestPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, q := &stream{}, &tagQueue{}
		tag := dr.Tag{ID: [16]byte{1}, Consistency: dr.FileSystem}
		go func() {
			time.Sleep(time.Millisecond)
			obeyed(s, q, time.Millisecond)
		}()
		if p, err := s.place(t.Context(), tag); err != nil || p.Seq != 7 {
			t.Errorf("placed at %v, %v", p, err)
		}
		if len(q.placed) != 0 {
			t.Error("an order was remembered as if it were the assignment's")
		}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		go func() {
			time.Sleep(time.Millisecond)
			obeyed(s, q, time.Minute)
		}()
		if _, err := s.place(short, tag); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("too late: %v", err)
		}
		time.Sleep(2 * time.Minute)
	})
}

// A new assignment leaves orders alone, and a withdrawn order makes nothing due.
func TestOrdersAndAssignments(t *testing.T) {
	q := &tagQueue{}
	o := &order{tag: dr.Tag{ID: [16]byte{1}}, done: make(chan struct{})}
	q.ask(dr.Tag{ID: [16]byte{2}})
	q.obey(o)
	q.set([]dr.Tag{{ID: [16]byte{3}}})
	if len(q.wanted) != 2 || q.wanted[0].order != o || q.wanted[1].ID != [16]byte{3} {
		t.Errorf("wanted %+v", q.wanted)
	}
	o.state.Store(orderWithdrawn)
	q.mark(tailOnly{}, time.Time{})
	if len(q.wanted) != 1 || q.count != 1 {
		t.Errorf("wanted %+v, %d due", q.wanted, q.count)
	}
	o.failed()
	if o.at != (dr.Position{}) {
		t.Error("failed, but placed")
	}
}

// tailOnly is a stream that stands still.
type tailOnly struct{ capture.Stream }

func (tailOnly) Tail() uint64 { return 1 }
