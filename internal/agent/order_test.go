package agent

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/dr"
)

// obeyed plays the replicator for the orders: it places them after a while.
func obeyed(s *stream, after time.Duration) {
	s.mu.Lock()
	orders := s.mu.orders
	s.mu.orders = nil
	s.mu.Unlock()
	time.Sleep(after)
	for _, o := range orders {
		if o.claim() {
			o.at = dr.Position{Timeline: 1, Seq: 7}
			close(o.done)
		}
	}
}

// Either the tag is placed and its position returned, or it never is.
func TestPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stream{}
		tag := dr.Tag{ID: [16]byte{1}, Consistency: dr.FileSystem}
		go func() {
			time.Sleep(time.Millisecond)
			obeyed(s, time.Millisecond)
		}()
		if p, err := s.place(t.Context(), tag, nil); err != nil || p.Seq != 7 {
			t.Errorf("placed at %v, %v", p, err)
		}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		go func() {
			time.Sleep(time.Millisecond)
			obeyed(s, time.Minute)
		}()
		if _, err := s.place(short, tag, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("too late: %v", err)
		}
		time.Sleep(2 * time.Minute)
	})
}

// ordered makes a scene in which a tag is ordered.
func ordered(s *scene, held func() error) *order {
	o := &order{tag: dr.Tag{ID: [16]byte{9}, Consistency: dr.FileSystem, Name: "still"}, held: held, done: make(chan struct{})}
	s.rep.tags.orders = append(s.rep.tags.orders, o)
	return o
}

func (o *order) settled() bool {
	select {
	case <-o.done:
		return true
	default:
		return false
	}
}

// TestOrderWaits: a tag that needs no stillness waits through what takes the stream's
// exactness, a new assignment leaves it alone, and a withdrawn one is forgotten.
func TestOrderWaits(t *testing.T) {
	for name, change := range map[string]func(*scene){
		"overflow": func(s *scene) { s.src.Overflow() },
		"new stream": func(s *scene) {
			s.at.Position.Seq += 100
			s.out.resume(s.at, 0, ReasonInitial)
		},
		"assignment": func(s *scene) { s.rep.tags.set([]dr.Tag{{ID: [16]byte{3}, Consistency: dr.Crash}}) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, 0)
			s.connect()
			s.untilExact()
			s.src.Write(1, 0, sector(1))
			change(s)
			o, gone := ordered(s, nil), ordered(s, nil)
			gone.state.Store(orderWithdrawn)
			for range 5 {
				if s.step(); o.settled() && s.rep.phase != Exact {
					t.Fatal("settled while the stream is not exact")
				}
			}
			s.untilExact()
			for range 5 {
				s.step()
			}
			if !o.settled() || o.at.Seq == 0 || o.why != nil {
				t.Errorf("placed at %v, %v", o.at, o.why)
			}
			if gone.settled() || len(s.rep.tags.orders) != 0 {
				t.Error("the withdrawn one was placed, or is kept")
			}
			if _, ok := s.rep.tags.placed[o.tag.ID]; ok {
				t.Error("an order was remembered as if it were the assignment's")
			}
		})
	}
}

// frozenStill stands still for ever.
type frozenStill struct{ still }

func (frozenStill) Hold(context.Context, time.Duration) error { return nil }
func (frozenStill) Held() error                               { return nil }
