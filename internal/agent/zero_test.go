package agent

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"
)

func TestAllZero(t *testing.T) {
	for _, n := range []int{0, 1, 511, 512, 513, 4096, 100_000} {
		b := make([]byte, n)
		if !allZero(b) {
			t.Errorf("%d zeroes are not all zero", n)
		}
		for _, i := range []int{0, 1, n / 2, n - 1} {
			if i < 0 || i >= n {
				continue
			}
			b[i] = 1
			if allZero(b) {
				t.Errorf("all zero in spite of byte %d of %d", i, n)
			}
			b[i] = 0
		}
	}
}

func TestPieces(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := make([]byte, rapid.IntRange(1, 64).Draw(t, "sectors")*512)
		for _, at := range rapid.SliceOf(rapid.IntRange(0, len(b)-1)).Draw(t, "at") {
			b[at] = 1
		}
		end := 0
		for i, p := range pieces(b) {
			if p.off != end || p.end <= p.off {
				t.Fatalf("piece %d is %+v, want it to begin at %d", i, p, end)
			}
			if part := b[p.off:p.end]; p.zero != bytes.Equal(part, make([]byte, len(part))) {
				t.Fatalf("piece %+v", p)
			}
			end = p.end
		}
		if end != len(b) {
			t.Fatalf("pieces end at %d of %d", end, len(b))
		}
	})
}

func BenchmarkAllZero(b *testing.B) {
	buf := make([]byte, 1<<20)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		allZero(buf)
	}
}
