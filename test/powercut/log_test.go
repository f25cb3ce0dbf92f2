package powercut

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"
)

func TestImage(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	const size = 64 << 10
	m, want := NewImage(), make([]byte, size)
	for range 500 {
		n := 1 + rng.IntN(9000)
		off := rng.IntN(size - n)
		if rng.IntN(3) == 0 {
			m.Zero(int64(off), int64(n))
			clear(want[off : off+n])
			continue
		}
		p := bytes.Repeat([]byte{byte(1 + rng.IntN(255))}, n)
		old, before := m.Clone(), m.Clone()
		m.WriteAt(p, int64(off))
		if !old.Equal(before) {
			t.Fatal("a write has changed a copy")
		}
		copy(want[off:], p)
	}
	got := make([]byte, size)
	if m.ReadAt(got, 0); !bytes.Equal(got, want) {
		t.Error("reads other than what was written")
	}
	if o := m.Clone(); !o.Equal(m) {
		t.Error("a copy differs")
	} else if o.WriteAt([]byte{255 - got[5]}, 5); o.Equal(m) {
		t.Error("another byte is taken for equal")
	}
}

// TestCut: what a flush covers is always there; of the rest each change both survives and is lost in some states,
// sectors are whole, and some changes are torn.
func TestCut(t *testing.T) {
	l := NewLog(1 << 20)
	put := func(at int64, b byte, n int) {
		if err := l.add(entry{off: at, n: int64(n), data: bytes.Repeat([]byte{b}, n)}); err != nil {
			t.Fatal(err)
		}
	}
	put(0, 1, 4096)
	put(4096, 2, 4096)
	if err := l.add(entry{}); err != nil {
		t.Fatal(err)
	}
	put(0, 3, 4096)
	put(8192, 4, 4096)
	if err := l.add(entry{off: 4096, n: 4096}); err != nil {
		t.Fatal(err)
	}
	r := NewReplay(l)
	if m, open := r.Cut(2, rand.New(rand.NewPCG(1, 9))); open != 2 || m.Equal(r.Whole()) {
		t.Errorf("before the flush %d changes are open", open)
	}
	kept, lost, torn := [3]int{}, [3]int{}, 0
	for seed := range uint64(300) {
		m, open := r.Cut(6, rand.New(rand.NewPCG(seed, 0)))
		if open != 3 {
			t.Fatalf("%d changes are open, want 3", open)
		}
		for i, change := range []struct{ old, new byte }{{1, 3}, {2, 0}, {0, 4}} {
			n := 0
			for s := range int64(8) {
				var sector [sectorSize]byte
				m.ReadAt(sector[:], int64(i)*4096+s*sectorSize)
				switch sector {
				case [sectorSize]byte(bytes.Repeat([]byte{change.new}, sectorSize)):
					n++
				case [sectorSize]byte(bytes.Repeat([]byte{change.old}, sectorSize)):
				default:
					t.Fatalf("seed %d: sector %d of block %d is neither old nor new", seed, s, i)
				}
			}
			switch n {
			case 0:
				lost[i]++
			case 8:
				kept[i]++
			default:
				torn++
			}
		}
	}
	if torn == 0 || min(kept[0], kept[1], kept[2], lost[0], lost[1], lost[2]) == 0 {
		t.Errorf("kept %v, lost %v, torn %d: some states are never made", kept, lost, torn)
	}
}

func TestLogIsBounded(t *testing.T) {
	l := NewLog(1000)
	if err := l.add(entry{n: 1000, data: make([]byte, 1000)}); err != nil {
		t.Fatal(err)
	}
	if err := l.add(entry{n: 1, data: []byte{1}}); !errors.Is(err, ErrFull) || l.Len() != 1 {
		t.Errorf("got %v, %d entries", err, l.Len())
	}
}
