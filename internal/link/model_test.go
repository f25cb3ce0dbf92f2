package link

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"farside/internal/dr"
	"farside/internal/frame"
)

// What a hostile network does to one message of the sender.
type fate int

const (
	pass fate = iota
	drop
	repeat
	swap // with the one after it
	flip
	cut
)

// hostile is a connection that does what it is told to the messages that are
// written to it, and breaks after the last of them.
type hostile struct {
	net.Conn
	fates []fate
	pos   int // of the flipped bit
	part  []byte
	held  []byte
}

func (h *hostile) Write(p []byte) (int, error) {
	h.part = append(h.part, p...)
	for len(h.part) >= headerSize {
		n := headerSize + int(binary.LittleEndian.Uint32(h.part[4:]))
		if len(h.part) < n {
			break
		}
		m := bytes.Clone(h.part[:n])
		h.part = h.part[n:]
		if err := h.message(m); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

func (h *hostile) message(m []byte) error {
	if m[0] != byte(msgFrame) {
		_, err := h.Conn.Write(m)
		return err
	}
	if len(h.fates) == 0 {
		h.Conn.Close()
		return net.ErrClosed
	}
	f := h.fates[0]
	h.fates = h.fates[1:]
	out := m
	switch f {
	case drop:
		return nil
	case repeat:
		out = append(bytes.Clone(m), m...)
	case swap:
		if h.held == nil {
			h.held = m
			return nil
		}
	case flip:
		m[h.pos%len(m)] ^= 1 << (h.pos % 8)
	case cut:
		_, _ = h.Conn.Write(m[:h.pos%len(m)])
		h.Conn.Close()
		return net.ErrClosed
	}
	if h.held != nil {
		out, h.held = append(bytes.Clone(out), h.held...), nil
	}
	_, err := h.Conn.Write(out)
	return err
}

// Whatever is dropped, repeated, swapped, flipped or cut on the way, and whatever
// the receiver loses of what it has not synced: it holds a prefix of what was sent at each
// moment, and all of it as soon as one connection is left alone.
func TestHostilePipe(t *testing.T) {
	all := frames(t, origin, 60)
	rapid.Check(t, func(rt *rapid.T) {
		plans := rapid.SliceOfN(rapid.SliceOfN(rapid.Custom(func(t *rapid.T) fate {
			return rapid.SampledFrom([]fate{pass, pass, pass, pass, pass, drop, repeat, swap, flip, cut}).Draw(t, "fate")
		}), 0, 30), 0, 8).Draw(rt, "plans")
		pos := rapid.IntRange(0, 4000).Draw(rt, "position")
		synctest.Test(t, func(t *testing.T) {
			src, sink := newList(all), newMemSink()
			for i, plan := range plans {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				session(ctx, src, sink.open, func(c net.Conn) net.Conn { return &hostile{Conn: c, fates: plan, pos: pos} })
				cancel()
				checkPrefix(t, sink, all)
				if i%2 == 1 {
					sink.crash()
				}
			}
			ctx, cancel := context.WithCancel(t.Context())
			go func() { <-src.done; cancel() }()
			session(ctx, src, sink.open, nil)
			checkAll(t, sink, all)
		})
	})
}

func checkPrefix(t *testing.T, s *memSink, want [][]byte) {
	t.Helper()
	if len(s.got) > len(want) {
		t.Fatalf("%d frames arrived of %d", len(s.got), len(want))
	}
	for i := range s.got {
		if !bytes.Equal(s.got[i], want[i]) {
			t.Fatalf("frame %d differs", i)
		}
	}
}

// The cores under any sequence of calls: what they accept keeps their
// invariants, and they never panic.
func TestCoresUnderAnySequence(t *testing.T) {
	all := frames(t, origin, 12)
	rapid.Check(t, func(rt *rapid.T) {
		s, r := sender{machine: machine}, receiver{at: origin}
		for range rapid.IntRange(1, 60).Draw(rt, "steps") {
			f := all[rapid.IntRange(0, len(all)-1).Draw(rt, "frame")]
			h, _ := frame.ParseHeader(f)
			seq := func(name string) dr.Seq { return dr.Seq(rapid.IntRange(0, 14).Draw(rt, name)) }
			before, at := s, r.at
			switch rapid.IntRange(0, 6).Draw(rt, "call") {
			case 0:
				c := origin
				c.Position.Seq = seq("welcome")
				_, _, err := s.receive(msgWelcome, encodeWelcome(c, seq("durable"))[headerSize:])
				if (err == nil) == before.streaming {
					rt.Fatalf("welcome: %v, streaming before: %v", err, before.streaming)
				}
			case 1:
				a := Ack{seq("stored"), seq("durable")}
				_, acked, err := s.receive(msgAck, a.encode()[headerSize:])
				if acked != (err == nil) || acked && s.ack != a {
					rt.Fatalf("ack %+v: %v", a, err)
				}
			case 2:
				if s.send(&h) == nil && s.at != h.End() {
					rt.Fatal("sent what does not continue")
				}
			case 3:
				got, err := r.take(f)
				switch {
				case got != nil && (err != nil || h.Prev != at.Position.Seq || r.at != h.End()):
					rt.Fatalf("took %d after %v", h.First, at.Position)
				case got == nil && r.at != at:
					rt.Fatal("moved without a frame")
				case got == nil && err == nil && h.Last > at.Position.Seq:
					rt.Fatal("a new frame was ignored")
				}
			case 4:
				typ := msgType(rapid.IntRange(0, 9).Draw(rt, "type"))
				_, _, err := s.receive(typ, rapid.SliceOfN(rapid.Byte(), 0, 90).Draw(rt, "body"))
				if err == nil && typ != msgPing && typ != msgAck && typ != msgWelcome {
					rt.Fatalf("message %d was accepted", typ)
				}
			case 5:
				bad := bytes.Clone(f)
				bad[rapid.IntRange(0, len(bad)-1).Draw(rt, "at")] ^= 1
				if got, err := r.take(bad); got != nil || err == nil {
					rt.Fatal("a damaged frame was taken or ignored")
				}
			case 6:
				code := Code(rapid.IntRange(0, 9).Draw(rt, "code"))
				_, _, err := s.receive(msgRefuse, (&Refused{Code: code}).encode()[headerSize:])
				if !errors.Is(err, kinds[code]) && !errors.Is(err, dr.ErrCorrupt) {
					rt.Fatalf("refused with %d: %v", code, err)
				}
			}
			if s.streaming && before.streaming && (s.ack.Stored < before.ack.Stored || s.ack.Durable < before.ack.Durable) {
				rt.Fatalf("ack went back from %+v to %+v", before.ack, s.ack)
			}
		}
	})
}

func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		big := make([]byte, 1<<20)
		e := frame.NewEncoder(origin, frame.None)
		var all []*frame.Frame
		for range 40 {
			e.Begin(frame.Changes, dr.Exact, false)
			for i := range int64(2) {
				mustOne(e.Add(dr.Extent{Offset: i << 20, Length: 1 << 20}, dr.Data, 0, big))
			}
			all = append(all, mustOne(frame.Parse(mustOne(e.Finish()))))
		}
		q := newQueue()
		put := 0
		go func() {
			for _, f := range all {
				if q.put(t.Context(), f) != nil {
					return
				}
				put++
			}
			_ = q.end(t.Context())
			put = -1
		}()
		var got []*frame.Frame
		for {
			synctest.Wait()
			if held := put - len(got); put >= 0 && int64(held)*all[0].Size() > queueBytes {
				t.Fatalf("%d frames held", held)
			}
			group, err := q.take(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(group) == 0 {
				break
			}
			if n := int64(len(group)) * all[0].Size(); n > groupBytes+all[0].Size() {
				t.Fatalf("a group of %d bytes", n)
			}
			got = append(got, group...)
		}
		synctest.Wait()
		for i := range all {
			if got[i] != all[i] {
				t.Fatalf("frame %d out of order", i)
			}
		}
		if len(got) != len(all) || put != -1 {
			t.Errorf("%d frames, %d", len(got), put)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := newQueue().take(ctx); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		deaf := newQueue()
		deaf.drop(dr.ErrFull)
		for _, f := range all { // more than fits
			mustOne(0, deaf.put(t.Context(), f))
		}
		if err := deaf.end(t.Context()); !errors.Is(err, dr.ErrFull) {
			t.Error(err)
		}
	})
}

// A sink that fails while frames flow: the sender is told why, and soon.
func TestFailingSinkTellsTheSender(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, break1 := range map[string]func(*memSink){
			"append": func(s *memSink) { s.fail = dr.ErrTimeline }, "sync": func(s *memSink) { s.failSync = dr.ErrTimeline },
		} {
			sink := newMemSink()
			src := newList(frames(t, origin, 400))
			began := time.Now()
			sendErr, receiveErr := session(t.Context(), src, func(ctx context.Context, h Hello) (Sink, error) {
				time.AfterFunc(0, func() { sink.mu.Lock(); defer sink.mu.Unlock(); break1(sink) })
				return sink, nil
			}, nil)
			if !errors.Is(sendErr, dr.ErrTimeline) || !errors.Is(receiveErr, dr.ErrTimeline) || time.Since(began) > 2*lingerFor {
				t.Errorf("%s: %v, %v after %v", name, sendErr, receiveErr, time.Since(began))
			}
		}
	})
}

// What lies before a welcome is forgotten by the sender: it must be stored.
func TestWelcomeCountsAsStored(t *testing.T) {
	all := frames(t, origin, 3)
	sink := newMemSink()
	for _, b := range all {
		mustOne(0, sink.Append(t.Context(), []*frame.Frame{mustOne(frame.Parse(b))}))
	}
	a, b := pipe()
	ended := make(chan error)
	go func() { ended <- Receive(t.Context(), b, sink.open) }()
	mustOne(a.Write(hello.encode()))
	typ, body, err := readMessage(a)
	if typ != msgWelcome || err != nil {
		t.Fatalf("message %d, %v", typ, err)
	}
	c, _, _ := parseWelcome(body)
	sink.crash()
	if kept := sink.Cursor(); kept != c || c.Position.Seq != 3 {
		t.Errorf("welcomed at %v, a crash leaves %v", c.Position, kept.Position)
	}
	a.Close()
	<-ended
	failing := newMemSink()
	failing.failSync = dr.ErrFull
	if sendErr, _ := session(t.Context(), newList(all), failing.open, nil); !errors.Is(sendErr, dr.ErrUnavailable) {
		t.Errorf("a sink that can't sync: %v", sendErr)
	}
}
