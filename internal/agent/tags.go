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
	wanted []dr.Tag // by the assignment
	placed map[[16]byte]dr.Position
	count  int       // how many of wanted are due
	at     uint64    // stream position that they must not precede
	when   time.Time // when that was the tail: the time of these tags
	orders []*order  // what this machine waits for
}

// maxPlaced bounds how many placed tags are remembered. The far side ignores a
// tag that it has, so forgetting one costs a frame.
const maxPlaced = 1024

// set replaces what the assignment wants by those of ts that were not placed.
func (q *tagQueue) set(ts []dr.Tag) {
	due := slices.Clone(q.wanted[:q.count])
	q.wanted = nil
	for _, t := range ts {
		q.ask(t)
	}
	if len(due) > len(q.wanted) || !slices.Equal(due, q.wanted[:len(due)]) {
		q.at, q.count = 0, 0
	}
}

// ask adds t to what is wanted.
func (q *tagQueue) ask(t dr.Tag) {
	has := slices.ContainsFunc(q.wanted, func(w dr.Tag) bool { return w.ID == t.ID })
	if _, ok := q.placed[t.ID]; !ok && !has {
		q.wanted = append(q.wanted, t)
	}
}

func (q *tagQueue) pending() bool { return len(q.wanted) > 0 || len(q.orders) > 0 }

// mark returns the stream position that the source must pass before the tags that
// are due may be placed: they come behind all that was submitted before.
func (q *tagQueue) mark(src capture.Stream, now time.Time) uint64 {
	if q.count == 0 && len(q.wanted) > 0 {
		q.at, q.when, q.count = src.Tail(), now, len(q.wanted)
	}
	return q.at
}

// take returns the tags that are due and forgets their mark.
func (q *tagQueue) take() []dr.Tag {
	due := q.wanted[:q.count]
	q.wanted = slices.Clone(q.wanted[q.count:])
	q.at, q.count = 0, 0
	return due
}

// note remembers where a tag was placed.
func (q *tagQueue) note(t dr.Tag, p dr.Position) {
	if q.placed == nil || len(q.placed) >= maxPlaced {
		q.placed = make(map[[16]byte]dr.Position)
	}
	q.placed[t.ID] = p
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
	when, due := r.tags.when, r.tags.take()
	for _, t := range due {
		placed, err := r.putTag(t, when)
		if err != nil {
			return false, err
		}
		if placed {
			r.tags.note(t, r.enc.Cursor().Position)
		}
	}
	return len(due) > 0, nil
}

// putTag places a tag here. It reports false if the stream has begun anew meanwhile.
func (r *replicator) putTag(t dr.Tag, when time.Time) (bool, error) {
	if err := r.cutFrame(); err != nil {
		return false, err
	}
	b, err := r.enc.Tag(t, when.UnixNano(), false)
	if err != nil {
		return false, fmt.Errorf("make tag %q: %w", t.Name, err)
	}
	return r.put(b, lagRecord{born: when, end: when, quiet: true}), nil
}

// checkTagName refuses names that no frame can carry.
func checkTagName(name string) error {
	if len(name) > dr.MaxTagName || !utf8.ValidString(name) {
		return fmt.Errorf("tag name of %d bytes: %w", len(name), dr.ErrInvalid)
	}
	return nil
}
