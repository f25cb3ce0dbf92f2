package load

import (
	"testing"
	"time"
)

func TestOracle(t *testing.T) {
	var o Oracle
	for row := int64(1); row <= 3; row++ {
		o.Record(row, time.Unix(0, row*10))
	}
	for at, want := range map[int64]int64{5: 0, 10: 0, 11: 1, 30: 2, 31: 3} {
		if got := o.DurableBefore(at); got != want {
			t.Errorf("durable before %d: row %d, want %d", at, got, want)
		}
	}
	if o.Last() != 3 {
		t.Errorf("last row %d", o.Last())
	}
}

func TestLongestPause(t *testing.T) {
	var o Oracle
	for _, at := range []int64{10, 20, 50, 60} {
		o.Record(at, time.Unix(0, at))
	}
	for _, c := range []struct {
		from, to int64
		want     time.Duration
	}{{0, 60, 30}, {10, 20, 10}, {50, 60, 10}, {60, 160, 100}, {30, 40, 10}, {0, 20, 10}} {
		if got := o.LongestPause(c.from, c.to); got != c.want {
			t.Errorf("from %d to %d: %v, want %v", c.from, c.to, got, c.want)
		}
	}
}
