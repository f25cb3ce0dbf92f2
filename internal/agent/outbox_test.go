package agent

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/dr"
	"farside/internal/frame"
)

// boxed is an outbox with the encoder that feeds it.
type boxed struct {
	*outbox
	enc *frame.Encoder
	gen int
}

func newBoxed(t *testing.T) *boxed {
	b := &boxed{outbox: newOutbox()}
	c := frame.Cursor{Machine: dr.MachineID{1}, Position: dr.Position{Timeline: 1, Seq: 100}}
	s := b.resume(c, 0, ReasonRestart)
	if s.generation != 1 || s.reason != ReasonRestart || s.cursor != c {
		t.Fatalf("first start %+v", s)
	}
	b.enc, b.gen = frame.NewEncoder(c, frame.None), 1
	return b
}

// beat puts a heartbeat frame and returns the place behind it.
func (b *boxed) beat(t *testing.T) frame.Cursor {
	t.Helper()
	f, err := b.enc.Heartbeat(0, false)
	if err != nil {
		t.Fatal(err)
	}
	if !b.put(b.gen, f, b.enc.Cursor(), lagRecord{}) {
		t.Fatal("frame refused")
	}
	return b.enc.Cursor()
}

// taken returns the sequence number of the next frame to send, or 0.
func (b *boxed) taken(t *testing.T) dr.Seq {
	t.Helper()
	f, _ := b.take()
	if f == nil {
		return 0
	}
	h, err := frame.ParseHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	return h.Last
}

func TestOutboxResume(t *testing.T) {
	b := newBoxed(t)
	base := b.enc.Cursor()
	c1, c2 := b.beat(t), b.beat(t)
	c3 := b.beat(t)
	for _, want := range []dr.Seq{101, 102, 103, 0} {
		if got := b.taken(t); got != want {
			t.Fatalf("took %d, want %d", got, want)
		}
	}
	resume := func(name string, c frame.Cursor, generation int, reason Reason, next dr.Seq) {
		t.Helper()
		s := b.resume(c, 0, ReasonInitial)
		if got := b.taken(t); s.generation != generation || s.reason != reason || got != next {
			t.Fatalf("%s: start %+v, next %d; want generation %d, %q, next %d", name, s, got, generation, reason, next)
		}
	}
	resume("nothing arrived", base, 1, ReasonRestart, 101)
	resume("one arrived", c1, 1, ReasonRestart, 102)
	if _, n := b.used(); n != 2 {
		t.Fatalf("%d frames kept, want 2", n)
	}
	resume("two arrived", c2, 1, ReasonRestart, 103)
	other := c3
	other.Chain[0]++
	resume("all arrived", c3, 1, ReasonRestart, 0)
	resume("same place, other history", other, 2, ReasonGap, 0)
	resume("receiver lost what was freed", c1, 3, ReasonGap, 0)
	resume("receiver is ahead", c3, 4, ReasonAhead, 0)
	if b.put(1, []byte("old"), c3, lagRecord{}) {
		t.Error("a frame of an old generation was accepted")
	}
	if n, _ := b.used(); n != 0 {
		t.Errorf("%d bytes left of an old stream", n)
	}
}

func TestOutboxAcks(t *testing.T) {
	b := newBoxed(t)
	b.beat(t)
	b.beat(t)
	b.acked(102, 0, time.Unix(1, 0))
	if _, n := b.used(); n != 2 {
		t.Fatalf("frames freed before they were sent: %d left", n)
	}
	b.taken(t)
	b.acked(102, 100, time.Unix(1, 0))
	if _, n := b.used(); n != 1 {
		t.Fatalf("%d frames left, want 1", n)
	}
	if d := b.delivery(time.Unix(2, 0), true); d.built != 102 || d.stored != 101 || d.durable != 100 {
		t.Errorf("delivery %+v", d)
	}
	if got := b.taken(t); got != 102 {
		t.Errorf("next is %d, want 102", got)
	}
	b.acked(102, 102, time.Unix(2, 0))
	if bytes, n := b.used(); bytes != 0 || n != 0 {
		t.Errorf("%d bytes in %d frames left", bytes, n)
	}
	if d := b.delivery(time.Unix(2, 0), true); d.stored != 102 || d.durable != 102 {
		t.Errorf("delivery %+v", d)
	}
}

func TestOutboxNextWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBoxed(t)
		go func() {
			time.Sleep(time.Second)
			b.beat(t)
		}()
		started := time.Now()
		if f, err := b.next(t.Context()); err != nil || f == nil || time.Since(started) != time.Second {
			t.Errorf("next after %v: %v", time.Since(started), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := b.next(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("next with nothing to send: %v", err)
		}
	})
}
