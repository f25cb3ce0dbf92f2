package agent

import (
	"math/bits"
	"time"

	"farside/internal/dr"
)

// lag measures the RPO: how old the oldest change of a frame is when the far
// side says that the frame is durable. It keeps one record per frame between
// building and durable, and merges neighbours when there are too many, which
// can only make the RPO look worse.
//
// It is not safe for concurrent use; the outbox guards it.
type lag struct {
	waiting []lagRecord // rising last
	hist    histogram
	point   time.Time // of the newest durable recovery point; zero when none
}

type lagRecord struct {
	last  dr.Seq
	born  time.Time // when the oldest change in it was captured
	end   time.Time // when the newest was
	quiet bool      // holds no change: heartbeat, tag
	open  bool      // holds no recovery point
}

// maxLagRecords bounds the memory of a lag to about half a megabyte.
const maxLagRecords = 8192

func (l *lag) add(r lagRecord) {
	if len(l.waiting) >= maxLagRecords {
		l.halve()
	}
	l.waiting = append(l.waiting, r)
}

// halve merges the records pairwise.
func (l *lag) halve() {
	out := l.waiting[:0]
	for i := 0; i+1 < len(l.waiting); i += 2 {
		a, b := l.waiting[i], l.waiting[i+1]
		if b.quiet || !a.quiet {
			b.born = a.born
		}
		b.quiet = a.quiet && b.quiet
		out = append(out, b)
	}
	if len(l.waiting)%2 == 1 {
		out = append(out, l.waiting[len(l.waiting)-1])
	}
	l.waiting = out
}

// durable takes note that everything up to seq is safe as of now.
func (l *lag) durable(seq dr.Seq, now time.Time) {
	n := 0
	for ; n < len(l.waiting) && l.waiting[n].last <= seq; n++ {
		r := l.waiting[n]
		if r.open {
			continue
		}
		l.point = r.end
		if !r.quiet {
			l.hist.add(now.Sub(r.born))
		}
	}
	l.waiting = append(l.waiting[:0], l.waiting[n:]...)
}

// now returns how much would be lost if the machine burnt down at t: the age
// of the oldest change that is not durable, or zero when all of them are. As
// long as the newest durable state is not a recovery point, it is the age of
// the newest one that was; ok is false when there never was one.
func (l *lag) now(t time.Time, exact bool) (age time.Duration, ok bool) {
	if l.point.IsZero() {
		return 0, false
	}
	if !exact {
		return max(0, t.Sub(l.point)), true
	}
	for _, r := range l.waiting {
		if r.open {
			return max(0, t.Sub(l.point)), true
		}
		if !r.quiet {
			return max(0, t.Sub(r.born)), true
		}
	}
	return 0, true
}

// reset forgets what waits: the stream begins anew.
func (l *lag) reset() { l.waiting = nil }

// histogram counts durations in buckets that are 1/8 of a power of two wide,
// so that a quantile is right within 13 %.
type histogram struct {
	count   uint64
	max     time.Duration
	buckets [64 * 8]uint64
}

func (h *histogram) add(d time.Duration) {
	h.count++
	h.max = max(h.max, d)
	h.buckets[bucketOf(d)]++
}

func bucketOf(d time.Duration) int {
	v := uint64(max(d, 0)) + 8
	exp := bits.Len64(v) - 4 // v>>exp is in [8, 16)
	return exp*8 + int(v>>exp) - 8
}

func bucketEnd(i int) time.Duration {
	return time.Duration(uint64(i%8+9)<<(i/8)) - 8
}

// quantile returns the upper end of the bucket in which the q-th part of the
// durations ends; zero when there are none.
func (h *histogram) quantile(q float64) time.Duration {
	if h.count == 0 {
		return 0
	}
	rank := uint64(q * float64(h.count))
	var seen uint64
	for i, n := range h.buckets {
		if seen += n; seen > rank || seen == h.count {
			return bucketEnd(i)
		}
	}
	return 0
}
