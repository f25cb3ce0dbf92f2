package frame

import (
	"fmt"

	"farside/internal/dr"
)

// MaxData is the longest data extent that an Encoder takes, in bytes.
const MaxData = 1 << 20

// Encoder makes the frames of one stream, each continuing the one before. It
// is not safe for concurrent use.
//
// Between Begin and Finish one frame is under construction; Tag and Heartbeat
// make a whole frame at once.
type Encoder struct {
	at    Cursor
	codec Codec

	begun bool
	h     Header // of the frame under construction
	table []byte
	raw   []byte
}

// NewEncoder returns an encoder whose first frame continues c. The data of
// frames is stored by codec.
func NewEncoder(c Cursor, codec Codec) *Encoder { return &Encoder{at: c, codec: codec} }

// Cursor returns where the stream stands after the last finished frame.
func (e *Encoder) Cursor() Cursor { return e.at }

// Begin starts a frame of kind Changes or Resync. The frame before must be
// finished.
func (e *Encoder) Begin(kind Kind, accuracy dr.Accuracy, open bool) {
	if e.begun || kind != Changes && kind != Resync {
		panic("frame: Begin out of turn")
	}
	e.start(kind, accuracy, open)
}

func (e *Encoder) start(kind Kind, accuracy dr.Accuracy, open bool) {
	seq := e.at.Position.Seq
	e.begun = true
	e.table, e.raw = e.table[:0], e.raw[:0]
	e.h = Header{
		Kind: kind, Accuracy: accuracy, Open: open,
		Machine: e.at.Machine, Timeline: e.at.Position.Timeline,
		Prev: seq, First: seq + 1, Last: seq, FirstTime: e.at.Time, LastTime: e.at.Time,
	}
}

// Pending returns what the frame under construction holds so far.
func (e *Encoder) Pending() (extents, rawBytes int) {
	if !e.begun {
		return 0, 0
	}
	return e.h.Extents, len(e.raw)
}

// Room reports whether one more extent with n bytes of data fits.
func (e *Encoder) Room(n int) bool {
	return e.h.Extents < MaxExtents && len(e.raw)+n <= MaxRaw
}

// Add appends one change to the frame under construction and returns its
// sequence number. The time is UTC ns; one that lies before the last is
// replaced by the last. data is copied; it is as long as x for dr.Data
// (at most MaxData) and empty otherwise. Errors wrap dr.ErrInvalid, or
// dr.ErrFull when there is no Room; the frame stays as it was.
func (e *Encoder) Add(x dr.Extent, what dr.What, time int64, data []byte) (dr.Seq, error) {
	if !e.begun {
		panic("frame: Add without Begin")
	}
	wantData := int64(0)
	if what == dr.Data {
		wantData = x.Length
	}
	switch {
	case what < dr.Data || what > dr.Discard, int64(len(data)) != wantData, len(data) > MaxData,
		x.Length <= 0, x.Offset < 0, (x.Length|x.Offset)%dr.SectorSize != 0,
		x.Length/dr.SectorSize > 1<<32-1, x.Offset > 1<<62:
		return 0, fmt.Errorf("add %v %v with %d bytes to frame: %w", what, x, len(data), dr.ErrInvalid)
	case !e.Room(len(data)):
		return 0, fmt.Errorf("add %v to frame: %w", x, dr.ErrFull)
	}
	time = max(time, e.h.LastTime)
	if e.h.Extents == 0 {
		e.h.FirstTime = time
	}
	e.h.LastTime = time
	e.h.Last++
	e.h.Extents++
	e.raw = append(e.raw, data...)

	e.table = appendEntry(e.table, Extent{Extent: x, What: what, Seq: e.h.Last, Time: time}, e.h.First, e.h.FirstTime)
	return e.h.Last, nil
}

// Finish returns the bytes of the frame under construction, which the caller
// owns. A frame without extents is dropped: nil, nil.
func (e *Encoder) Finish() ([]byte, error) {
	if !e.begun {
		panic("frame: Finish without Begin")
	}
	if e.h.Extents == 0 {
		e.begun = false
		return nil, nil
	}
	e.h.Codec = e.codec
	return e.finish(), nil
}

// Tag returns a frame that marks the position after the last frame with t.
// It takes one sequence number. Errors wrap dr.ErrInvalid.
func (e *Encoder) Tag(t dr.Tag, time int64, open bool) ([]byte, error) {
	if err := checkTag(t); err != nil {
		return nil, err
	}
	e.single(TagKind, time, open)
	e.raw = append(e.raw, tagPayload(t)...)
	return e.finish(), nil
}

// Heartbeat returns a frame that says that nothing changed up to time. It
// takes one sequence number.
func (e *Encoder) Heartbeat(time int64, open bool) ([]byte, error) {
	e.single(Heartbeat, time, open)
	return e.finish(), nil
}

func (e *Encoder) single(kind Kind, time int64, open bool) {
	if e.begun {
		panic("frame: tag or heartbeat within a frame")
	}
	e.start(kind, dr.Exact, open)
	e.h.Last = e.h.First
	e.h.FirstTime = max(time, e.h.FirstTime)
	e.h.LastTime = e.h.FirstTime
}

func (e *Encoder) finish() []byte {
	e.h.RawLen = len(e.raw)
	e.h.Chain = chain(e.at.Chain, &e.h, e.table, e.raw)
	b := assemble(&e.h, e.table, e.raw, e.h.Codec.Compression())
	e.at = e.h.End()
	e.begun = false
	return b
}
