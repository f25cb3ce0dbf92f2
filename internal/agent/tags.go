package agent

import (
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
}

// wish is a tag that is wanted: by the assignment, or by an order of this machine.
type wish struct {
	dr.Tag
	order *order // nil: by the assignment
}

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

func (q *tagQueue) pending() bool { return len(q.wanted) > 0 }

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

// checkTagName refuses names that no frame can carry.
func checkTagName(name string) error {
	if len(name) > dr.MaxTagName || !utf8.ValidString(name) {
		return fmt.Errorf("tag name of %d bytes: %w", len(name), dr.ErrInvalid)
	}
	return nil
}
