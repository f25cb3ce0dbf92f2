package agent

import (
	"context"
	"fmt"
	"sync"
	"time"

	"farside/internal/dr"
	"farside/internal/frame"
)

// outbox holds the frames that are built but not yet stored by the process
// server, so that a broken link can resume where the receiver stands. It
// passes frames from the replicator, which puts them, to the link, which takes
// them, and the receiver's cursor the other way. It is safe for concurrent
// use by one replicator and one link at a time.
//
// The stream restarts when the receiver stands at a place from which the
// outbox can't go on. Each start has a number (its generation, from 1), so that a
// frame of the old stream that is still being built can't slip into the new.
type outbox struct {
	mu struct {
		sync.Mutex
		start   start
		base    frame.Cursor // before the first entry
		entries []entry
		sent    int // entries that the link took
		bytes   int64
		fresh   int64 // bytes put since the last fold
		err     error // nothing more may be sent
		durable dr.Seq
		lag     lag
		changed chan struct{} // closed and replaced at each change
	}
}

// start is where a stream begins and why. The zero value is "not yet".
type start struct {
	generation int
	cursor     frame.Cursor
	reason     Reason
}

type entry struct {
	bytes []byte
	end   frame.Cursor
}

// entryOverhead is what a frame costs in memory besides its bytes: its entry
// and its lag record.
const entryOverhead = 256

func (e entry) cost() int64 { return int64(len(e.bytes)) + entryOverhead }

// newOutbox returns an empty outbox.
func newOutbox() *outbox {
	o := &outbox{}
	o.mu.changed = make(chan struct{})
	return o
}

// put appends a frame of the generation; it reports false, and drops the
// frame, when that generation has ended. The caller has made sure of room.
func (o *outbox) put(generation int, b []byte, end frame.Cursor, r lagRecord) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mu.start.generation != generation {
		return false
	}
	o.mu.entries = append(o.mu.entries, entry{b, end})
	o.mu.bytes += entry{bytes: b}.cost()
	o.mu.fresh += int64(len(b))
	r.last = end.Position.Seq
	o.mu.lag.add(r)
	o.notifyLocked()
	return true
}

// used returns the bytes and the number of the frames that are not stored yet.
func (o *outbox) used() (bytes int64, frames int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.mu.bytes, len(o.mu.entries)
}

// starting returns the newest start.
func (o *outbox) starting() start {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.mu.start
}

// resume makes the frames that follow c the next to be sent. When the outbox
// can't go on from c, it drops everything and starts a new stream there; first
// is the reason if this is the first stream. What is durable may have gone back.
func (o *outbox) resume(c frame.Cursor, durable dr.Seq, first Reason) start {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.mu.durable = durable
	if o.mu.start.generation > 0 && o.rewindLocked(c) {
		o.notifyLocked()
		return o.mu.start
	}
	reason := first
	if o.mu.start.generation > 0 {
		reason = ReasonGap
		if c.Position.Seq > o.endLocked().Position.Seq {
			reason = ReasonAhead
		}
	}
	o.mu.start = start{generation: o.mu.start.generation + 1, cursor: c, reason: reason}
	o.mu.base, o.mu.entries, o.mu.sent, o.mu.bytes, o.mu.fresh, o.mu.err = c, nil, 0, 0, 0, nil
	o.mu.lag.reset()
	o.notifyLocked()
	return o.mu.start
}

// rewindLocked puts the sending position behind c, if c is the end of a frame
// that was put, or the place before the first that is kept.
func (o *outbox) rewindLocked(c frame.Cursor) bool {
	if sameCursor(c, o.mu.base) {
		o.mu.sent = 0
		return true
	}
	for i := range o.mu.entries {
		if sameCursor(c, o.mu.entries[i].end) {
			o.freeLocked(i + 1)
			o.mu.sent = 0
			return true
		}
	}
	return false
}

// sameCursor compares what makes a place in a stream. The chain proves that
// both sides hold the same changes; the time is only advice.
func sameCursor(a, b frame.Cursor) bool {
	return a.Machine == b.Machine && a.Position == b.Position && a.Chain == b.Chain
}

// next returns the next frame to send; it waits until there is one.
func (o *outbox) next(ctx context.Context) ([]byte, error) {
	for {
		b, changed := o.take()
		if b != nil {
			return b, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for a frame to send: %w", ctx.Err())
		}
	}
}

// take returns the next frame to send, or nil and a channel that is closed
// when there may be one.
func (o *outbox) take() ([]byte, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mu.sent == len(o.mu.entries) {
		return nil, o.mu.changed
	}
	o.mu.sent++
	return o.mu.entries[o.mu.sent-1].bytes, nil
}

// acked takes note of what the receiver has stored and what is durable on the
// far side. What is stored is freed.
func (o *outbox) acked(stored, durable dr.Seq, now time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := 0
	for n < o.mu.sent && o.mu.entries[n].end.Position.Seq <= stored {
		n++
	}
	o.freeLocked(n)
	if durable > o.mu.durable {
		o.mu.durable = durable
		o.mu.lag.durable(durable, now)
	}
	o.notifyLocked()
}

// stored returns the newest sequence number that the process server has stored.
func (o *outbox) stored() dr.Seq {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.mu.base.Position.Seq
}

// durable returns the newest sequence number that is durable on the far side.
func (o *outbox) durable() dr.Seq {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.mu.durable
}

func (o *outbox) freeLocked(n int) {
	if n == 0 {
		return
	}
	o.mu.base = o.mu.entries[n-1].end
	for i := range n {
		o.mu.bytes -= o.mu.entries[i].cost()
		o.mu.entries[i] = entry{}
	}
	o.mu.entries = o.mu.entries[n:]
	o.mu.sent = max(0, o.mu.sent-n)
}

func (o *outbox) endLocked() frame.Cursor {
	if n := len(o.mu.entries); n > 0 {
		return o.mu.entries[n-1].end
	}
	return o.mu.base
}

// watch returns a channel that is closed at the next change.
func (o *outbox) watch() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.mu.changed
}

func (o *outbox) notifyLocked() {
	close(o.mu.changed)
	o.mu.changed = make(chan struct{})
}

// delivery is what an outbox knows of the way of its frames.
type delivery struct {
	built, stored, durable dr.Seq
	bytes                  int64 // not stored yet
	rpo                    time.Duration
	rpoKnown               bool
	p50, p99, max          time.Duration
	samples                uint64
	machine                dr.MachineID
	timeline               dr.Timeline
	point                  time.Time // of the newest durable recovery point
}

// delivery reports as of now; exact says that the stream is exact now.
func (o *outbox) delivery(now time.Time, exact bool) delivery {
	o.mu.Lock()
	defer o.mu.Unlock()
	end := o.endLocked()
	d := delivery{
		machine: end.Machine, timeline: end.Position.Timeline, point: o.mu.lag.point,
		built: end.Position.Seq, stored: o.mu.base.Position.Seq, durable: o.mu.durable,
		bytes: o.mu.bytes, samples: o.mu.lag.hist.count,
		p50: o.mu.lag.hist.quantile(0.50), p99: o.mu.lag.hist.quantile(0.99), max: o.mu.lag.hist.max,
	}
	d.rpo, d.rpoKnown = o.mu.lag.now(now, exact)
	return d
}
