package vault

import (
	"errors"
	"fmt"
	"slices"
	"sort"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
)

// Span is a run of history of one accuracy. In an exact span every position
// from First to Last is a recovery point, in an epoch span the end of each of
// its frames, the last one included, and in an open span none.
type Span struct {
	Accuracy            dr.Accuracy
	Open                bool
	First, Last         dr.Position // of one timeline
	FirstTime, LastTime int64       // UTC ns
}

// Tagged is a tag and where it is in the stream.
type Tagged struct {
	dr.Tag
	Position dr.Position
	Time     int64 // UTC ns
}

// Selector says which recovery point is wanted.
type Selector struct {
	kind selectorKind
	pos  dr.Position
	time int64
	tag  string
}

type selectorKind uint8

const (
	selectLatest selectorKind = iota
	selectPosition
	selectTime
	selectTag
)

// SelectLatest wants the newest recovery point.
func SelectLatest() Selector { return Selector{} }

// SelectPosition wants exactly a position.
func SelectPosition(p dr.Position) Selector { return Selector{kind: selectPosition, pos: p} }

// SelectTime wants the last recovery point at or before a time, in UTC ns.
func SelectTime(t int64) Selector { return Selector{kind: selectTime, time: t} }

// SelectTag wants the newest recovery point that bears a tag of that name.
func SelectTag(name string) Selector { return Selector{kind: selectTag, tag: name} }

// Horizon returns the oldest position that can be opened and its time.
func (v *Vault) Horizon() (dr.Position, int64) {
	m := v.manifest.Load()
	return dr.Position{Timeline: m.BaseTimeline, Seq: m.Horizon}, m.HorizonTime
}

// Spans returns the kept history of the machine in order. Open neighbours are one span, of
// the lower accuracy: during a sync, captured writes and bulk data take turns, and nothing there
// is a recovery point.
func (v *Vault) Spans() ([]Span, error) {
	var out []Span
	for _, k := range slices.Backward(v.history(v.Timeline(), v.Head().Position.Seq)) {
		all, err := v.index.spans(k.timeline, k.after+1, k.through)
		if err != nil {
			return nil, err
		}
		for _, s := range joinSpans(all) {
			first, last := max(s.First, k.after+1), min(s.Last, k.through)
			next := Span{
				s.Accuracy, s.Open,
				dr.Position{Timeline: k.timeline, Seq: first},
				dr.Position{Timeline: k.timeline, Seq: last},
				s.FirstTime, s.LastTime,
			}
			if n := len(out) - 1; n >= 0 && s.Open && out[n].Open && out[n].Last.Timeline == k.timeline {
				next.First, next.FirstTime = out[n].First, out[n].FirstTime
				next.Accuracy = max(next.Accuracy, out[n].Accuracy)
				out = out[:n]
			}
			out = append(out, next)
		}
	}
	return out, nil
}

// history is links, newest first, with what is before the horizon left out.
func (v *Vault) history(tl dr.Timeline, through dr.Seq) []link {
	m := v.manifest.Load()
	out := m.links(tl, through)
	for i := range out {
		if out[i].timeline == m.BaseTimeline {
			out[i].after = m.Horizon
		}
	}
	return out
}

// Tags returns the tags of the kept history in order, without those that were
// withdrawn.
func (v *Vault) Tags() ([]Tagged, error) {
	var out []Tagged
	for _, k := range slices.Backward(v.history(v.Timeline(), v.Head().Position.Seq)) {
		if k.through <= k.after {
			continue
		}
		err := v.index.scan(tagKey(k.timeline, k.after+1), tagKey(k.timeline, k.through), func(key, value []byte) error {
			t, err := decodeTag(key, value)
			if err == nil && t.Consistency == dr.Revoked {
				out = slices.DeleteFunc(out, func(o Tagged) bool { return o.ID == t.ID })
				return nil
			}
			out = append(out, t)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// scan calls fn for the keys in [from, to].
func (x *index) scan(from, to []byte, fn func(key, value []byte) error) error {
	if err := x.err(); err != nil {
		return err
	}
	it, err := x.db.NewIter(&pebble.IterOptions{LowerBound: from, UpperBound: append(slices.Clone(to), 0)})
	if err != nil {
		return fmt.Errorf("read index: %w", err)
	}
	for ok := it.First(); ok; ok = it.Next() {
		if err := fn(it.Key(), it.Value()); err != nil {
			return errors.Join(err, it.Close())
		}
	}
	if err := it.Close(); err != nil {
		return fmt.Errorf("read index: %w", err)
	}
	return nil
}

// Resolve finds a recovery point. Errors wrap dr.ErrNoPoint and name the
// nearest points.
func (v *Vault) Resolve(sel Selector) (dr.RecoveryPoint, error) {
	switch sel.kind {
	case selectPosition:
		return v.resolvePosition(sel.pos)
	case selectTime:
		return v.resolveTime(sel.time)
	case selectTag:
		return v.resolveTag(sel.tag)
	}
	p, ok, err := v.pointBefore(v.Timeline(), v.Head().Position.Seq)
	if err == nil && !ok {
		err = fmt.Errorf("the stream has no recovery point yet: %w", dr.ErrNoPoint)
	}
	if err != nil {
		return dr.RecoveryPoint{}, err
	}
	return v.describePoint(p)
}

func (v *Vault) resolvePosition(want dr.Position) (dr.RecoveryPoint, error) {
	l := v.log(want.Timeline)
	if l == nil {
		return dr.RecoveryPoint{}, fmt.Errorf("open %v: no such timeline: %w", want, dr.ErrNoPoint)
	}
	head := l.Durable().Position.Seq
	if want.Seq <= head {
		p, ok, err := v.pointBefore(want.Timeline, want.Seq)
		if err != nil {
			return dr.RecoveryPoint{}, err
		}
		if ok && p.Seq == want.Seq {
			r, err := v.describePoint(p)
			r.Position = want // where the caller stands may be a branch's name for it
			return r, err
		}
	}
	return dr.RecoveryPoint{}, v.noPoint(want, head)
}

// noPoint is the error that names the points nearest to a position.
func (v *Vault) noPoint(want dr.Position, head dr.Seq) error {
	before, haveBefore, err1 := v.pointBefore(want.Timeline, min(want.Seq, head))
	after, haveAfter, err2 := v.pointAfter(want.Timeline, want.Seq, head)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	text := "there is none yet"
	switch {
	case haveBefore && haveAfter:
		text = fmt.Sprintf("the nearest are %s and %s", v.tell(before), v.tell(after))
	case haveBefore:
		text = "the last before is " + v.tell(before)
	case haveAfter:
		text = "the first is " + v.tell(after)
	}
	return fmt.Errorf("%v is no recovery point; %s: %w", want, text, dr.ErrNoPoint)
}

// tell names a point with its time.
func (v *Vault) tell(p dr.Position) string {
	t, err := v.timeOf(p)
	if err != nil {
		return p.String()
	}
	return fmt.Sprintf("%v (%s)", p, time.Unix(0, t).UTC().Format(time.RFC3339Nano))
}

func (v *Vault) resolveTime(t int64) (dr.RecoveryPoint, error) {
	head := v.Head().Position
	for _, k := range v.history(head.Timeline, head.Seq) {
		all, err := v.index.spans(k.timeline, k.after+1, k.through)
		if err != nil {
			return dr.RecoveryPoint{}, err
		}
		for _, s := range slices.Backward(all) {
			if s.Open || s.FirstTime > t {
				continue
			}
			seq, ok, err := v.spanAtTime(s, k, t)
			if err != nil {
				return dr.RecoveryPoint{}, err
			}
			if ok {
				return v.describePoint(dr.Position{Timeline: k.timeline, Seq: seq})
			}
		}
	}
	m := v.manifest.Load()
	if m.HorizonPoint && m.HorizonTime <= t {
		return v.describePoint(dr.Position{Timeline: m.BaseTimeline, Seq: m.Horizon})
	}
	first, ok, err := v.pointAfter(head.Timeline, 0, head.Seq)
	if err != nil {
		return dr.RecoveryPoint{}, err
	}
	text := "there is none yet"
	if ok {
		text = "the first is " + v.tell(first)
	}
	return dr.RecoveryPoint{}, fmt.Errorf("no recovery point at or before %s; %s: %w",
		time.Unix(0, t).UTC().Format(time.RFC3339Nano), text, dr.ErrNoPoint)
}

func (v *Vault) resolveTag(name string) (dr.RecoveryPoint, error) {
	tags, err := v.Tags()
	if err != nil {
		return dr.RecoveryPoint{}, err
	}
	var names []string
	for _, t := range slices.Backward(tags) {
		if t.Name == name {
			r, err := v.Resolve(SelectPosition(t.Position))
			if !errors.Is(err, dr.ErrNoPoint) {
				return r, err
			}
			continue // in an open span; an older one of the name may do
		}
		if len(names) < 5 {
			names = append(names, fmt.Sprintf("%q", t.Name))
		}
	}
	return dr.RecoveryPoint{}, fmt.Errorf("no recovery point is tagged %q; the newest tags are %v: %w", name, names, dr.ErrNoPoint)
}

// pointBefore returns the last recovery point at or before a position.
func (v *Vault) pointBefore(tl dr.Timeline, seq dr.Seq) (dr.Position, bool, error) {
	for _, k := range v.history(tl, seq) {
		all, err := v.index.spans(k.timeline, k.after+1, k.through)
		if err != nil {
			return dr.Position{}, false, err
		}
		for _, s := range slices.Backward(all) {
			got, ok, err := v.spanBefore(s, k)
			if err != nil || ok {
				return dr.Position{Timeline: k.timeline, Seq: got}, ok, err
			}
		}
		m := v.manifest.Load()
		if k.timeline == m.BaseTimeline && m.HorizonPoint && k.through >= m.Horizon {
			return dr.Position{Timeline: k.timeline, Seq: m.Horizon}, true, nil
		}
	}
	return dr.Position{}, false, nil
}

// spanBefore returns the last point of a span within a link.
func (v *Vault) spanBefore(s span, k link) (dr.Seq, bool, error) {
	limit := min(s.Last, k.through)
	if s.Open || limit <= k.after {
		return 0, false, nil
	}
	if s.Accuracy == dr.Exact || limit == s.Last {
		return limit, true, nil
	}
	e, err := v.entryAt(k.timeline, limit)
	if err != nil || e.Last == limit {
		return limit, err == nil, err
	}
	return e.First - 1, e.First > max(s.First, k.after+1), nil
}

// pointAfter returns the first recovery point at or after a position and not
// behind head.
func (v *Vault) pointAfter(tl dr.Timeline, seq, head dr.Seq) (dr.Position, bool, error) {
	m := v.manifest.Load()
	for _, k := range slices.Backward(v.history(tl, head)) {
		if k.timeline == m.BaseTimeline && m.HorizonPoint && seq <= m.Horizon {
			return dr.Position{Timeline: k.timeline, Seq: m.Horizon}, true, nil
		}
		from := max(seq, k.after+1)
		all, err := v.index.spans(k.timeline, from, k.through)
		if err != nil {
			return dr.Position{}, false, err
		}
		for _, s := range all {
			got := max(from, s.First)
			if s.Open {
				continue
			}
			if s.Accuracy == dr.Epoch {
				e, err := v.entryAt(k.timeline, got)
				if err != nil {
					return dr.Position{}, false, err
				}
				got = e.Last
			}
			if got <= k.through {
				return dr.Position{Timeline: k.timeline, Seq: got}, true, nil
			}
		}
	}
	return dr.Position{}, false, nil
}

// spanAtTime returns the last point of a span with a time ≤ t.
func (v *Vault) spanAtTime(s span, k link, t int64) (seq dr.Seq, ok bool, err error) {
	limit := min(s.Last, k.through)
	err = v.withSegment(k.timeline, s.First, func(seg *openSegment) error {
		all := seg.reader.Entries()
		from := sort.Search(len(all), func(i int) bool { return all[i].Last >= s.First })
		to := sort.Search(len(all), func(i int) bool { return all[i].First > limit })
		for _, e := range slices.Backward(all[from:to]) {
			switch {
			case s.Accuracy == dr.Epoch:
				seq, ok = e.Last, e.LastTime <= t && e.Last <= limit
			case e.LastTime <= t:
				seq, ok = min(e.Last, limit), true
			case e.FirstTime <= t:
				f, err := seg.tables(v.opts.Cache, e.Off)
				if err != nil {
					return err
				}
				n := sort.Search(f.Extents, func(i int) bool { return f.Extent(i).Time > t })
				seq, ok = min(f.Extent(max(n-1, 0)).Seq, limit), n > 0
			}
			if ok && seq > k.after {
				return nil
			}
		}
		ok = false
		return nil
	})
	return seq, ok, err
}

// describePoint tells all of a recovery point.
func (v *Vault) describePoint(p dr.Position) (dr.RecoveryPoint, error) {
	m := v.manifest.Load()
	r := dr.RecoveryPoint{Position: p, Accuracy: dr.Exact, Consistency: dr.Crash}
	if p.Timeline == m.BaseTimeline && p.Seq == m.Horizon {
		r.Time, r.Accuracy = m.HorizonTime, dr.Epoch
		return r, nil
	}
	e, err := v.entryAt(p.Timeline, p.Seq)
	if err != nil {
		return r, err
	}
	r.Accuracy = e.Accuracy
	if r.Time, err = v.timeOf(p); err != nil || e.Kind != frame.TagKind {
		return r, err
	}
	f, err := v.frameAt(p.Timeline, p.Seq)
	if err != nil {
		return r, err
	}
	t, err := f.Tag()
	if t.Consistency != dr.Revoked {
		r.Consistency, r.Tag = t.Consistency, t.Name
	}
	return r, err
}

// timeOf returns the time of a position.
func (v *Vault) timeOf(p dr.Position) (int64, error) {
	m := v.manifest.Load()
	if p.Timeline == m.BaseTimeline && p.Seq == m.Horizon {
		return m.HorizonTime, nil
	}
	var t int64
	err := v.withSegment(p.Timeline, p.Seq, func(s *openSegment) error {
		e, ok := s.reader.Find(p.Seq)
		if !ok {
			return fmt.Errorf("segment lacks %v: %w", p, dr.ErrCorrupt)
		}
		if t = e.LastTime; e.Last == p.Seq {
			return nil
		}
		f, err := s.tables(v.opts.Cache, e.Off)
		if err != nil {
			return err
		}
		if n := sort.Search(f.Extents, func(i int) bool { return f.Extent(i).Seq > p.Seq }); n > 0 {
			t = f.Extent(n - 1).Time
		}
		return nil
	})
	return t, err
}

// entryAt returns the segment's entry of the frame that holds a position.
func (v *Vault) entryAt(tl dr.Timeline, seq dr.Seq) (e segment.Entry, err error) {
	err = v.withSegment(tl, seq, func(s *openSegment) error {
		var ok bool
		if e, ok = s.reader.Find(seq); !ok {
			return fmt.Errorf("segment lacks %d:%d: %w", tl, seq, dr.ErrCorrupt)
		}
		return nil
	})
	return e, err
}

// frameAt returns the frame that holds a position, with its payload.
func (v *Vault) frameAt(tl dr.Timeline, seq dr.Seq) (f *frame.Frame, err error) {
	err = v.withSegment(tl, seq, func(s *openSegment) error {
		e, ok := s.reader.Find(seq)
		if !ok {
			return fmt.Errorf("segment lacks %d:%d: %w", tl, seq, dr.ErrCorrupt)
		}
		f, err = s.reader.Frame(e.Off)
		return err
	})
	return f, err
}

// withSegment calls fn with the segment that holds a position.
func (v *Vault) withSegment(tl dr.Timeline, seq dr.Seq, fn func(*openSegment) error) error {
	all := v.manifest.Load().segments(tl)
	i := sort.Search(len(all), func(i int) bool { return all[i].First > seq })
	if i == 0 {
		return fmt.Errorf("no segment holds %d:%d: %w", tl, seq, dr.ErrNotFound)
	}
	s, err := v.segs.acquire(all[i-1].key())
	if err != nil {
		return err
	}
	defer v.segs.release(s)
	return fn(s)
}
