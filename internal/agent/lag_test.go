package agent

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"farside/internal/dr"
)

func TestLagNow(t *testing.T) {
	t0 := time.Unix(1000, 0)
	at := func(s int) time.Time { return t0.Add(time.Duration(s) * time.Second) }
	var l lag
	check := func(when int, exact bool, want time.Duration, wantOK bool) {
		t.Helper()
		if got, ok := l.now(at(when), exact); got != want || ok != wantOK {
			t.Errorf("at %d: RPO %v %v, want %v %v", when, got, ok, want, wantOK)
		}
	}
	check(0, true, 0, false)
	l.add(lagRecord{last: 5, born: at(0), end: at(1), open: true})
	l.add(lagRecord{last: 6, born: at(2), end: at(2), quiet: true})
	l.durable(5, at(3))
	check(3, true, 0, false) // nothing durable is a point yet
	l.durable(6, at(4))
	check(4, true, 0, true)
	l.add(lagRecord{last: 7, born: at(5), end: at(6)})
	l.add(lagRecord{last: 8, born: at(7), end: at(7), quiet: true})
	check(8, true, 3*time.Second, true)
	l.durable(8, at(9))
	check(9, true, 0, true)
	if n, p := l.hist.count, l.hist.quantile(0.99); n != 1 || p < 4*time.Second || p > 4600*time.Millisecond {
		t.Errorf("%d samples, p99 %v, want 1 of about 4s", n, p)
	}
	l.add(lagRecord{last: 9, born: at(10), end: at(10), open: true})
	check(12, true, 5*time.Second, true)  // since the newest durable point
	check(12, false, 5*time.Second, true) // the same while the stream is open
}

func TestLagStaysSmall(t *testing.T) {
	t0 := time.Unix(1000, 0)
	var l lag
	for i := range 5 * maxLagRecords {
		l.add(lagRecord{last: dr.Seq(i + 1), born: t0.Add(time.Duration(i)), end: t0.Add(time.Duration(i)), quiet: i == 0})
	}
	if len(l.waiting) > maxLagRecords {
		t.Errorf("%d records", len(l.waiting))
	}
	l.durable(0, t0)
	if got, _ := l.now(t0.Add(time.Hour), true); got != 0 {
		t.Errorf("RPO known before the first point: %v", got)
	}
	l.durable(2*maxLagRecords, t0.Add(time.Hour))
	if got, ok := l.now(t0.Add(time.Hour), true); !ok || got > time.Hour || got < time.Hour-time.Millisecond {
		t.Errorf("RPO %v %v, want about 1h", got, ok)
	}
	if l.waiting[len(l.waiting)-1].last != 5*maxLagRecords {
		t.Errorf("the newest record is %+v", l.waiting[len(l.waiting)-1])
	}
}

func TestHistogram(t *testing.T) {
	var h histogram
	if h.quantile(0.5) != 0 {
		t.Error("quantile of nothing")
	}
	for i := range 1000 {
		h.add(time.Duration(i+1) * time.Millisecond)
	}
	for q, want := range map[float64]time.Duration{0.5: 500 * time.Millisecond, 0.99: 990 * time.Millisecond, 1: time.Second} {
		if got := h.quantile(q); got < want || got > want*9/8+time.Microsecond {
			t.Errorf("quantile %v is %v, want %v and at most an eighth more", q, got, want)
		}
	}
}

func TestHistogramBuckets(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := time.Duration(rapid.Int64().Draw(t, "d"))
		i := bucketOf(d)
		if d = max(d, 0); d > 1<<62 {
			return
		}
		if end := bucketEnd(i); end < d || i > 0 && bucketEnd(i-1) > d {
			t.Errorf("%d is in bucket %d, which ends at %d", d, i, end)
		}
	})
}
