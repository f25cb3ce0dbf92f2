// Package extent holds sets of byte or sector ranges of one disk.
//
// It is pure: no I/O, no clock, no goroutine. A Set is not safe for concurrent
// use; its owner guards it. It knows nothing of disks or positions: callers
// keep a Set per disk and choose the unit.
package extent

import (
	"iter"
	"slices"
)

// Range is the half-open interval [Start, End).
type Range struct{ Start, End int64 }

// Len returns End − Start.
func (r Range) Len() int64 { return r.End - r.Start }

// chunkMax bounds the ranges in a chunk, so that an insertion moves at most a
// few KiB however many ranges the set has.
const chunkMax = 256

// Set is a set of integers, kept as sorted ranges that neither touch nor
// overlap. The zero value is empty. A call costs O(log n + ranges touched).
type Set struct {
	chunks [][]Range // each sorted, non-empty, at most chunkMax long
	count  int       // ranges
	total  int64     // integers in all ranges
}

// place is the position of a range: chunk and index within it. The place
// behind the last range is {len(chunks), 0}.
type place struct{ chunk, index int }

// Len returns the number of ranges.
func (s *Set) Len() int { return s.count }

// Bytes returns the sum of the lengths of all ranges, in the unit of the caller.
func (s *Set) Bytes() int64 { return s.total }

// Clear empties the set.
func (s *Set) Clear() { *s = Set{} }

// All yields the ranges in rising order. The set must not change meanwhile.
func (s *Set) All() iter.Seq[Range] {
	return func(yield func(Range) bool) {
		for _, c := range s.chunks {
			for _, r := range c {
				if !yield(r) {
					return
				}
			}
		}
	}
}

// Add puts [start, end) into the set. An empty range changes nothing.
func (s *Set) Add(start, end int64) {
	if start >= end {
		return
	}
	from := s.search(func(r Range) bool { return r.End >= start })
	to := s.search(func(r Range) bool { return r.Start > end })
	if from != to {
		start = min(start, s.at(from).Start)
		end = max(end, s.at(s.before(to)).End)
	}
	s.splice(from, to, Range{start, end})
}

// Remove takes [start, end) out of the set.
func (s *Set) Remove(start, end int64) {
	if start >= end {
		return
	}
	from := s.search(func(r Range) bool { return r.End > start })
	to := s.search(func(r Range) bool { return r.Start >= end })
	if from == to {
		return
	}
	var keep []Range
	if first := s.at(from); first.Start < start {
		keep = append(keep, Range{first.Start, start})
	}
	if last := s.at(s.before(to)); last.End > end {
		keep = append(keep, Range{end, last.End})
	}
	s.splice(from, to, keep...)
}

// Contains reports whether all of [start, end) is in the set. An empty range
// always is.
func (s *Set) Contains(start, end int64) bool {
	if start >= end {
		return true
	}
	p := s.search(func(r Range) bool { return r.End > start })
	return p.chunk < len(s.chunks) && s.at(p).Start <= start && end <= s.at(p).End
}

// Overlaps reports whether any of [start, end) is in the set.
func (s *Set) Overlaps(start, end int64) bool {
	p := s.search(func(r Range) bool { return r.End > start })
	return start < end && p.chunk < len(s.chunks) && s.at(p).Start < end
}

// Intersect returns the parts of [start, end) that are in the set, in order.
func (s *Set) Intersect(start, end int64) []Range {
	var out []Range
	for r := range s.overlapping(start, end) {
		out = append(out, Range{max(r.Start, start), min(r.End, end)})
	}
	return out
}

// Subtract returns the parts of [start, end) that are not in the set, in order.
func (s *Set) Subtract(start, end int64) []Range {
	var out []Range
	for r := range s.overlapping(start, end) {
		if r.Start > start {
			out = append(out, Range{start, r.Start})
		}
		start = r.End
	}
	if start < end {
		out = append(out, Range{start, end})
	}
	return out
}

// TakeFirst removes up to limit integers from the low end at or behind from
// and returns them; it returns nil when there are none.
func (s *Set) TakeFirst(from, limit int64) []Range {
	var out []Range
	for p := s.search(func(r Range) bool { return r.End > from }); limit > 0 && p.chunk < len(s.chunks); p = s.after(p) {
		r := s.at(p)
		r.Start = max(r.Start, from)
		r.End = min(r.End, r.Start+limit)
		limit -= r.Len()
		out = append(out, r)
	}
	for _, r := range out {
		s.Remove(r.Start, r.End)
	}
	return out
}

// overlapping yields the ranges that share an integer with [start, end).
func (s *Set) overlapping(start, end int64) iter.Seq[Range] {
	return func(yield func(Range) bool) {
		if start >= end {
			return
		}
		for p := s.search(func(r Range) bool { return r.End > start }); p.chunk < len(s.chunks); p = s.after(p) {
			if r := s.at(p); r.Start >= end || !yield(r) {
				return
			}
		}
	}
}

func (s *Set) at(p place) Range { return s.chunks[p.chunk][p.index] }

func (s *Set) after(p place) place {
	if p.index++; p.index == len(s.chunks[p.chunk]) {
		return place{p.chunk + 1, 0}
	}
	return p
}

func (s *Set) before(p place) place {
	if p.index > 0 {
		return place{p.chunk, p.index - 1}
	}
	return place{p.chunk - 1, len(s.chunks[p.chunk-1]) - 1}
}

// search returns the first place where f holds; f must be false on a prefix
// of the ranges and true on the rest.
func (s *Set) search(f func(Range) bool) place {
	cmp := func(r Range, _ struct{}) int {
		if f(r) {
			return 1
		}
		return -1
	}
	c, _ := slices.BinarySearchFunc(s.chunks, struct{}{}, func(c []Range, _ struct{}) int {
		return cmp(c[len(c)-1], struct{}{})
	})
	if c == len(s.chunks) {
		return place{c, 0}
	}
	i, _ := slices.BinarySearchFunc(s.chunks[c], struct{}{}, cmp)
	return place{c, i}
}

// splice replaces the ranges in [from, to) by repl.
func (s *Set) splice(from, to place, repl ...Range) {
	for p := from; p != to; p = s.after(p) {
		s.count--
		s.total -= s.at(p).Len()
	}
	for _, r := range repl {
		s.count++
		s.total += r.Len()
	}
	var head, tail []Range
	if from.chunk < len(s.chunks) {
		head = s.chunks[from.chunk][:from.index]
	}
	last := to.chunk // first chunk that stays as it is
	if to.chunk < len(s.chunks) && (to.index > 0 || to.chunk == from.chunk) {
		tail, last = s.chunks[to.chunk][to.index:], to.chunk+1
	}
	if n := len(head) + len(repl) + len(tail); n > 0 && n <= chunkMax && last == from.chunk+1 {
		s.chunks[from.chunk] = slices.Replace(s.chunks[from.chunk], from.index, len(s.chunks[from.chunk])-len(tail), repl...)
		return
	}
	merged := slices.Concat(head, repl, tail)
	var chunks [][]Range
	for len(merged) > chunkMax {
		chunks = append(chunks, slices.Clip(merged[:chunkMax/2]))
		merged = merged[chunkMax/2:]
	}
	if len(merged) > 0 {
		chunks = append(chunks, merged)
	}
	s.chunks = slices.Replace(s.chunks, from.chunk, last, chunks...)
}
