package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
	"unicode/utf8"

	"farside/internal/capture"
	"farside/internal/dr"
)

// tagQueue holds the tags that are asked for and remembers which were placed, so
// that asking twice tags once.
type tagQueue struct {
	wanted []wish
	placed map[[16]byte]dr.Position
	count  int       // how many of wanted are due
	at     uint64    // stream position that they must not precede
	when   time.Time // when that was the tail: the time of these tags
	held   *heldTag  // nil: none
}

// wish is a tag that is wanted: by the assignment, or by an order of this machine.
type wish struct {
	dr.Tag
	order *order // nil: by the assignment
}

// heldTag is a tag that says that the file systems stood still: it must be placed while
// they do.
type heldTag struct {
	tag  dr.Tag
	ctx  context.Context // ends when it is not wanted any more
	mark uint64          // stream position that was the tail when they stood still
	when time.Time       // then
	held func() error    // reports whether they still do
	done chan error      // gets one value: nil when it is placed, else why it was not; has room for it
}

// errNotExact says that the stream can't have a point now.
var errNotExact = fmt.Errorf("the stream is not exact: %w", dr.ErrUnavailable)

// maxPlaced bounds how many placed tags are remembered. The far side ignores a
// tag that it has, so forgetting one costs a frame.
const maxPlaced = 1024

// set replaces what the assignment wants by those of ts that were not placed.
func (q *tagQueue) set(ts []dr.Tag) {
	due := slices.Clone(q.wanted[:q.count])
	q.wanted = slices.DeleteFunc(slices.Clone(q.wanted), func(w wish) bool { return w.order == nil })
	for _, t := range ts {
		q.ask(t)
	}
	if len(due) > len(q.wanted) || !slices.Equal(due, q.wanted[:len(due)]) {
		q.at, q.count = 0, 0
	}
}

// ask adds t to what is wanted.
func (q *tagQueue) ask(t dr.Tag) {
	has := slices.ContainsFunc(q.wanted, func(w wish) bool { return w.ID == t.ID })
	if _, ok := q.placed[t.ID]; !ok && !has {
		q.wanted = append(q.wanted, wish{Tag: t})
	}
}

// obey adds an order to what is wanted.
func (q *tagQueue) obey(o *order) { q.wanted = append(q.wanted, wish{o.tag, o}) }

func (q *tagQueue) pending() bool { return len(q.wanted) > 0 || q.held != nil }

// mark returns the stream position that the source must pass before the tags that
// are due may be placed: they come behind all that was submitted before.
func (q *tagQueue) mark(src capture.Stream, now time.Time) uint64 {
	if q.count == 0 {
		q.wanted = slices.DeleteFunc(q.wanted, func(w wish) bool { return w.order != nil && w.order.withdrawn() })
	}
	if q.count == 0 && len(q.wanted) > 0 {
		q.at, q.when, q.count = src.Tail(), now, len(q.wanted)
	}
	return q.at
}

// take returns the tags that are due and forgets their mark.
func (q *tagQueue) take() []wish {
	due := q.wanted[:q.count]
	q.wanted = append([]wish(nil), q.wanted[q.count:]...)
	q.at, q.count = 0, 0
	return due
}

func (q *tagQueue) place(w wish, p dr.Position) {
	if w.order != nil {
		w.order.placed(p)
		return
	}
	if q.placed == nil || len(q.placed) >= maxPlaced {
		q.placed = make(map[[16]byte]dr.Position)
	}
	q.placed[w.ID] = p
}

// restart forgets the tags that went behind p: the stream goes another way from
// there, and who still wants them will ask again.
func (q *tagQueue) restart(p dr.Position) {
	q.at, q.count = 0, 0
	for id, at := range q.placed {
		if at.Seq > p.Seq {
			delete(q.placed, id)
		}
	}
}

// putTags places the tags that are due and reports whether there were any.
func (r *replicator) putTags() (bool, error) {
	if r.tags.count == 0 {
		return false, nil
	}
	if err := r.cutFrame(); err != nil {
		return false, err
	}
	when := r.tags.when
	for _, t := range r.tags.take() {
		if t.order != nil && !t.order.claim() {
			continue
		}
		b, err := r.enc.Tag(t.Tag, when.UnixNano(), false)
		placed := err == nil && r.put(b, lagRecord{born: when, end: when, quiet: true})
		if placed {
			r.tags.place(t, r.enc.Cursor().Position)
		} else if t.order != nil {
			t.order.failed()
		}
		if err != nil {
			return false, fmt.Errorf("make tag %q: %w", t.Name, err)
		}
	}
	return true, nil
}

// putHeld places the tag that waits for it behind everything that was submitted
// before the file systems stood still, if they do so still: then the stream holds nothing
// that was written later. If that can't be had, who waits is told, and the tag is forgotten.
func (r *replicator) putHeld() error {
	h := r.tags.held
	if h == nil {
		return nil
	}
	placed, why, err := r.tryHeld(h)
	if err != nil || placed || why != nil {
		r.tags.held = nil
		h.done <- errors.Join(why, err)
	}
	return err
}

// tryHeld returns why a tag can't be placed at all, and an error that ends the stream.
func (r *replicator) tryHeld(h *heldTag) (placed bool, why, err error) {
	if h.ctx.Err() != nil {
		return false, h.ctx.Err(), nil
	}
	if r.phase != Exact {
		return false, errNotExact, nil
	}
	caught, err := r.caughtUp(h.mark)
	switch {
	case err != nil:
		return false, nil, err
	case r.phase != Exact:
		return false, errNotExact, nil
	case !caught:
		return false, nil, nil
	}
	// All that the frames hold was taken over before this question.
	if why := h.held(); why != nil {
		return false, why, nil
	}
	if err := r.cutFrame(); err != nil {
		return false, nil, err
	}
	b, err := r.enc.Tag(h.tag, h.when.UnixNano(), false)
	if err != nil {
		return false, nil, fmt.Errorf("make tag %q: %w", h.tag.Name, err)
	}
	if !r.put(b, lagRecord{born: h.when, end: h.when, quiet: true}) {
		return false, errNotExact, nil // the stream has begun anew just now
	}
	r.tags.place(wish{Tag: h.tag}, r.enc.Cursor().Position)
	return true, nil, nil
}

// checkTagName refuses names that no frame can carry.
func checkTagName(name string) error {
	if len(name) > dr.MaxTagName || !utf8.ValidString(name) {
		return fmt.Errorf("tag name of %d bytes: %w", len(name), dr.ErrInvalid)
	}
	return nil
}
