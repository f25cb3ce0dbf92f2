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
