package mastertarget

import (
	"testing"

	"farside/internal/dr"
	"farside/internal/vault"
)

// A run of epochs is one span, whether or not they begin with open frames; syncs and
// exact spans stay what they are.
func TestEpochsAreOneSpan(t *testing.T) {
	span := func(a dr.Accuracy, open bool, first, last dr.Seq) vault.Span {
		at := func(s dr.Seq) dr.Position { return dr.Position{Timeline: 1, Seq: s} }
		return vault.Span{Accuracy: a, Open: open, First: at(first), Last: at(last), FirstTime: int64(first), LastTime: int64(last)}
	}
	got := joinEpochs([]vault.Span{
		span(dr.Exact, false, 1, 10), span(dr.Epoch, true, 11, 20), span(dr.Epoch, false, 21, 30),
		span(dr.Epoch, true, 31, 40), span(dr.Epoch, false, 41, 50),
		span(dr.Exact, false, 51, 60), span(dr.Epoch, true, 61, 70), span(dr.Exact, false, 71, 80),
	})
	want := []vault.Span{
		span(dr.Exact, false, 1, 10), span(dr.Epoch, false, 11, 50),
		span(dr.Exact, false, 51, 60), span(dr.Epoch, true, 61, 70), span(dr.Exact, false, 71, 80),
	}
	if len(got) != len(want) {
		t.Fatalf("%d spans: %+v", len(got), got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("span %d: %+v, want %+v", i, got[i], want[i])
		}
	}
}
