package agent

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"pgregory.net/rapid"

	"farside/internal/dr"
	"farside/internal/frame"
)

// receiver is a process server that stores frames when it likes.
type receiver struct {
	at     frame.Cursor // after the last frame stored
	disk   [8 * dr.SectorSize]byte
	flying []*frame.Frame // sent, not stored
	epochs int
}

// Whatever is put, sent, stored, folded and broken off: the receiver can always
// go on from where it stands, without a new stream, and ends with what was written.
func TestFoldingTheOutbox(t *testing.T) {
	folds, epochs := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		start := frame.Cursor{Machine: dr.MachineID{1}, Position: dr.Position{Timeline: 1}}
		o, r := newOutbox(), &receiver{at: start}
		gen := o.resume(start, 0, ReasonInitial).generation
		enc := frame.NewEncoder(start, frame.None)
		var want [8 * dr.SectorSize]byte
		for i := range rapid.IntRange(1, 200).Draw(t, "steps") {
			switch rapid.IntRange(0, 9).Draw(t, "step") {
			default:
				at := rapid.IntRange(0, 7).Draw(t, "sector") * dr.SectorSize
				data := bytes.Repeat([]byte{byte(i + 1)}, dr.SectorSize)
				copy(want[at:], data)
				put(t, o, gen, enc, int64(at), data)
			case 5, 6:
				r.take(t, o)
			case 7:
				r.store(t, o, rapid.IntRange(0, len(r.flying)).Draw(t, "stored"))
			case 8:
				if o.fold(gen, 1, frame.Plain) {
					folds++
				}
			case 9: // the link breaks: what flies is stored or not
				r.store(t, nil, rapid.IntRange(0, len(r.flying)).Draw(t, "arrived"))
				r.flying = nil
				if s := o.resume(r.at, 0, ReasonInitial); s.generation != gen {
					t.Fatalf("a new stream from %v: %v", r.at.Position, s.reason)
				}
			}
		}
		for n := -1; n != len(r.flying); {
			n = len(r.flying)
			r.take(t, o)
		}
		r.store(t, o, len(r.flying))
		if used, frames := o.used(); r.disk != want || used != 0 || frames != 0 || o.broken() != nil {
			t.Fatalf("%d bytes in %d frames are left, %v", used, frames, o.broken())
		}
		epochs += r.epochs
	})
	if folds == 0 || epochs == 0 {
		t.Errorf("%d folds, %d epochs", folds, epochs)
	}
}

func put(t *rapid.T, o *outbox, gen int, enc *frame.Encoder, at int64, data []byte) {
	enc.Begin(frame.Changes, dr.Exact, false)
	_, err := enc.Add(dr.Extent{Offset: at, Length: int64(len(data))}, dr.Data, 0, data)
	b, err2 := enc.Finish()
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	if !o.put(gen, b, enc.Cursor(), lagRecord{}) {
		t.Fatal("not taken")
	}
}

func (r *receiver) take(t *rapid.T, o *outbox) {
	b, _ := o.take()
	if b == nil {
		return
	}
	f, err := frame.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	r.flying = append(r.flying, f)
}

// store stores the first n frames that fly; without an outbox nobody is told.
func (r *receiver) store(t *rapid.T, o *outbox, n int) {
	for _, f := range r.flying[:n] {
		raw, err := f.Payload(nil)
		if err := errors.Join(err, f.Check(r.at)); err != nil {
			t.Fatal(err)
		}
		for _, x := range f.All() {
			copy(r.disk[x.Offset:x.End()], raw[x.RawOff:])
		}
		r.at = f.End()
		if f.Folded {
			r.epochs++
		}
	}
	r.flying = r.flying[n:]
	if o != nil {
		o.acked(r.at.Position.Seq, 0, time.Time{})
	}
}

// What would not get much smaller keeps its points, and is not gone over again
// before there is more.
func TestOutboxIsFoldedOnlyWhereItHelps(t *testing.T) {
	start := frame.Cursor{Machine: dr.MachineID{1}, Position: dr.Position{Timeline: 1}}
	rapid.Check(t, func(t *rapid.T) {
		o := newOutbox()
		gen := o.resume(start, 0, ReasonInitial).generation
		enc := frame.NewEncoder(start, frame.None)
		for i := range 20 {
			put(t, o, gen, enc, int64(i)*dr.SectorSize, make([]byte, dr.SectorSize))
		}
		before, _ := o.used()
		if o.fold(gen, 1, frame.Plain) || o.fold(gen+1, 0, frame.Plain) {
			t.Fatal("folded")
		}
		put(t, o, gen, enc, 0, make([]byte, dr.SectorSize))
		if o.fold(gen, 1<<20, frame.Plain) {
			t.Fatal("folded for one more frame")
		}
		if after, n := o.used(); after <= before || n != 21 {
			t.Fatalf("%d bytes in %d frames", after, n)
		}
	})
}
