package extent

import (
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

const universe = 600

// model is the oracle: one bool per integer.
type model [universe]bool

func (m *model) fill(a, b int64, v bool) {
	for i := a; i < b; i++ {
		m[i] = v
	}
}

func (m *model) runs(a, b int64, v bool) (out []Range) {
	for i := a; i < b; i++ {
		if m[i] != v {
			continue
		}
		if n := len(out); n > 0 && out[n-1].End == i {
			out[n-1].End++
		} else {
			out = append(out, Range{i, i + 1})
		}
	}
	return out
}

func TestSetAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s Set
		var m model
		for range rapid.IntRange(1, 400).Draw(t, "ops") {
			a := rapid.Int64Range(0, universe).Draw(t, "a")
			b := min(universe, a+rapid.Int64Range(0, 9).Draw(t, "n"))
			switch rapid.IntRange(0, 3).Draw(t, "op") {
			case 0, 1:
				s.Add(a, b)
				m.fill(a, b, true)
			case 2:
				s.Remove(a, b)
				m.fill(a, b, false)
			case 3:
				limit := rapid.Int64Range(0, 5).Draw(t, "limit")
				for _, r := range s.TakeFirst(a, limit) {
					if len(m.runs(r.Start, r.End, false)) > 0 || r.Start < a {
						t.Fatalf("took %v that was not there", r)
					}
					m.fill(r.Start, r.End, false)
					limit -= r.Len()
				}
				if limit > 0 && len(m.runs(a, universe, true)) > 0 {
					t.Fatal("took less than there was")
				}
			}
			verify(t, &s, &m, a, b)
		}
	})
}

func verify(t *rapid.T, s *Set, m *model, a, b int64) {
	all := m.runs(0, universe, true)
	if got := slices.Collect(s.All()); !slices.Equal(got, all) {
		t.Fatalf("ranges %v, want %v", got, all)
	}
	var total int64
	for _, r := range all {
		total += r.Len()
	}
	if s.Len() != len(all) || s.Bytes() != total {
		t.Fatalf("Len %d Bytes %d, want %d %d", s.Len(), s.Bytes(), len(all), total)
	}
	if got, want := s.Intersect(a, b), m.runs(a, b, true); !slices.Equal(got, want) {
		t.Fatalf("Intersect(%d,%d) = %v, want %v", a, b, got, want)
	}
	if got, want := s.Subtract(a, b), m.runs(a, b, false); !slices.Equal(got, want) {
		t.Fatalf("Subtract(%d,%d) = %v, want %v", a, b, got, want)
	}
	if got, want := s.Contains(a, b), len(m.runs(a, b, false)) == 0; got != want {
		t.Fatalf("Contains(%d,%d) = %v", a, b, got)
	}
	if got, want := s.Overlaps(a, b), len(m.runs(a, b, true)) > 0; got != want {
		t.Fatalf("Overlaps(%d,%d) = %v", a, b, got)
	}
}

// Many ranges exercise the splitting of chunks, which small models don't reach.
func TestSetManyRanges(t *testing.T) {
	var s Set
	rng := rand.New(rand.NewPCG(1, 2))
	want := map[int64]bool{}
	for range 20_000 {
		x := rng.Int64N(50_000) * 2
		if rng.IntN(4) == 0 {
			s.Remove(x, x+1)
			delete(want, x)
		} else {
			s.Add(x, x+1)
			want[x] = true
		}
	}
	if s.Len() != len(want) {
		t.Fatalf("%d ranges, want %d", s.Len(), len(want))
	}
	for r := range s.All() {
		if !want[r.Start] {
			t.Fatalf("unexpected %v", r)
		}
	}
	s.Add(0, 100_000)
	if s.Len() != 1 || !s.Contains(0, 100_000) {
		t.Fatalf("after covering all: %d ranges", s.Len())
	}
	s.Clear()
	if s.Len() != 0 || s.Bytes() != 0 {
		t.Fatal("not empty after Clear")
	}
}

func BenchmarkAddRandom(b *testing.B) {
	var s Set
	rng := rand.New(rand.NewPCG(1, 2))
	for b.Loop() {
		x := rng.Int64N(1 << 22)
		s.Add(x*8, x*8+8)
	}
}
