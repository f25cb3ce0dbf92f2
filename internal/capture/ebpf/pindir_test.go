//go:build linux && amd64

package ebpf

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"farside/internal/capture"
	"farside/internal/dr"
)

// fakePins makes subdirectories, each with two files that tell its name.
func fakePins(t *testing.T, names string) *pinDir {
	t.Helper()
	p := &pinDir{path: t.TempDir(), lock: -1}
	for _, name := range strings.Fields(names) {
		if err := os.Mkdir(p.in(name), 0o700); err != nil {
			t.Fatal(err)
		}
		for _, file := range []string{name, pinLink + name} {
			if err := os.WriteFile(p.in(name, file), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return p
}

// live returns the name under which what is live was made, or else what is there.
func (p *pinDir) live(t *testing.T) string {
	t.Helper()
	files, err := filepath.Glob(p.in("*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range files {
		files[i], _ = filepath.Rel(p.path, name)
	}
	if len(files) == 2 && filepath.Dir(files[0]) == pinLive && files[1] == filepath.Join(pinLive, filepath.Base(files[1])) {
		return strings.TrimPrefix(filepath.Base(files[0]), pinLink)
	}
	return strings.Join(files, " ")
}

// TestPinStates goes through the table of pinDir.
func TestPinStates(t *testing.T) {
	for _, c := range []struct{ found, live string }{
		{"", ""},
		{"live", "live"},
		{"new", ""},
		{"live new", "live"},
		{"new old", "new"},
		{"live old", "live"},
		{"old", ""},
		{"live new old", "live"},
	} {
		p := fakePins(t, c.found)
		if err := p.recover(); err != nil || p.live(t) != c.live {
			t.Errorf("%q: %q is live, want %q; %v", c.found, p.live(t), c.live, err)
		}
	}
}

// TestPinCrash stops commit and clear at each of their steps: a file system that lets
// only so many of them through. What is live afterwards is the old or the new.
func TestPinCrash(t *testing.T) {
	seen := map[string]bool{}
	for steps := range 8 {
		p := fakePins(t, "live new")
		crash(t, steps, []func() error{
			func() error { return p.rename(pinLive, pinOld) },
			func() error { return p.rename(pinNew, pinLive) },
			func() error { return os.Remove(p.in(pinOld, pinLink+pinLive)) },
			func() error { return os.Remove(p.in(pinOld, pinLive)) },
			func() error { return os.Remove(p.in(pinOld)) },
		})
		if err := p.recover(); err != nil {
			t.Fatal(err)
		}
		live := p.live(t)
		seen[live] = true
		if want := map[bool]string{true: "new", false: "live"}[steps > 0]; live != want {
			t.Errorf("after %d steps: %q is live, want %q", steps, live, want)
		}
	}
	if len(seen) != 2 {
		t.Errorf("saw only %v", seen)
	}
	p := fakePins(t, "live new")
	if err := p.commit(); err != nil || p.live(t) != "new" {
		t.Errorf("commit: %q is live, %v", p.live(t), err)
	}
	if err := p.clear(); err != nil || exists(p.path) {
		t.Errorf("clear: %v", err)
	}
	if err := p.clear(); err != nil {
		t.Errorf("clear again: %v", err)
	}
}

func crash(t *testing.T, n int, steps []func() error) {
	t.Helper()
	for _, step := range steps[:min(n, len(steps))] {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPinLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b")
	p, err := lockPins(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockPins(path); !errors.Is(err, dr.ErrExists) {
		t.Errorf("locked twice: %v", err)
	}
	p.unlock()
	if p, err = lockPins(path); err != nil {
		t.Fatal(err)
	}
	p.unlock()
}

// TestSplit: positions and places belong together, whatever Lost events there are.
func TestSplit(t *testing.T) {
	n := &notes{}
	places := []uint64{0, 0, 80, 80, 800, 1 << 40}
	for i, place := range places {
		n.Lost[i+1] = place
	}
	n.Noticed = uint64(len(places))
	for _, place := range []uint64{0, 8, 72, 80, 88, 800, 808, 1 << 40, 1<<40 + 8} {
		for losts := range uint64(len(places) + 1) {
			if losts > 0 && places[losts-1] > place || losts < uint64(len(places)) && places[losts] < place {
				continue // there is no such position
			}
			if p, k := n.split(place + losts); p != place || k != losts {
				t.Errorf("place %d behind %d losts: got %d, %d", place, losts, p, k)
			}
			if last := losts == uint64(len(places)) || places[losts] > place; last && n.position(place) != place+losts {
				t.Errorf("place %d behind %d losts: position %d", place, losts, n.position(place))
			}
		}
	}
	n = &notes{Noticed: 3 * maxLosts} // the table went round
	for k := uint64(2*maxLosts + 1); k <= n.Noticed; k++ {
		n.Lost[k%maxLosts] = 8 * k
	}
	if p, k := n.split(8*n.Noticed + n.Noticed + 8); p != 8*n.Noticed+8 || k != n.Noticed {
		t.Errorf("got %d, %d", p, k)
	}
}

func TestMeta(t *testing.T) {
	devs := []*device{
		{disk: capture.Disk{ID: 3, Size: 1 << 20}, dev: 7 << 20, start: 2048, seq: 5},
		{disk: capture.Disk{ID: 1, Size: 1 << 30}, dev: 8 << 20},
	}
	o := Options{RingBytes: 1 << 20, BlockSize: 4096, Pin: "/x", Memory: 5}
	n := &notes{}
	want := metaOf(devs, o)
	if err := n.begin(want); err != nil {
		t.Fatal(err)
	}
	got, err := n.meta()
	if err != nil || !got.equal(want) || len(got.disks()) != 2 || got.disks()[0].ID != 3 {
		t.Fatalf("got %+v, %v", got, err)
	}
	for name, change := range map[string]func(*meta){
		"ring": func(m *meta) { m.Ring *= 2 }, "block": func(m *meta) { m.Block *= 2 }, "bitmap only": func(m *meta) { m.BitmapOnly = true },
		"order": func(m *meta) { slices.Reverse(m.Disks) }, "size": func(m *meta) { m.Disks[1].Size += 512 },
		"seq": func(m *meta) { m.Disks[0].Seq++ }, "start": func(m *meta) { m.Disks[0].Start++ }, "one less": func(m *meta) { m.Disks = m.Disks[:1] },
	} {
		m := metaOf(devs, o)
		if change(&m); m.equal(want) {
			t.Errorf("%s makes no difference", name)
		}
	}
	n.Version++
	if _, err := n.meta(); !errors.Is(err, dr.ErrUnsupported) {
		t.Errorf("another version: %v", err)
	}
}

func TestBecomes(t *testing.T) {
	d := metaDisk{ID: 3, Dev: 7, Start: 1, Size: 4096, Seq: 9}
	for _, c := range []struct {
		is   metaDisk
		tail int64 // -1: another disk
	}{
		{d, 0},
		{metaDisk{3, 7, 1, 8192, 9}, 4096},
		{metaDisk{3, 7, 1, 2048, 9}, -1}, // shrunk
		{metaDisk{4, 7, 1, 4096, 9}, -1},
		{metaDisk{3, 8, 1, 8192, 9}, -1},
		{metaDisk{3, 7, 2, 4096, 9}, -1},
		{metaDisk{3, 7, 1, 4096, 10}, -1},
	} {
		tail, ok := d.becomes(c.is)
		if ok != (c.tail >= 0) || ok && tail != (dr.Extent{Disk: 3, Offset: 4096, Length: c.tail}) {
			t.Errorf("%+v: %v, %v", c.is, tail, ok)
		}
	}
}

func FuzzMeta(f *testing.F) {
	good, _ := json.Marshal(meta{Ring: 1 << 20, Block: 4096, Disks: []metaDisk{{ID: 1, Size: 1 << 20}}})
	f.Add(good)
	f.Add([]byte(`{"ring":65536,"block":512,"disks":[{"size":-512}]}`))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := parseMeta(text)
		if err != nil {
			if !errors.Is(err, dr.ErrCorrupt) {
				t.Error(err)
			}
			return
		}
		first, words := capture.BitmapLayout(m.disks(), m.Block) // must not overflow
		if words <= 0 || len(first) != len(m.Disks) || !m.equal(m) {
			t.Errorf("%d words for %+v", words, m)
		}
	})
}

func TestParseStat(t *testing.T) {
	bytes, writes, err := parseStat("   1 2 3 4   50 6 700 8 9 10 11 12 13 14 15 16 17\n")
	if bytes != 700*512 || writes != 56 || err != nil {
		t.Errorf("%d bytes, %d writes, %v", bytes, writes, err)
	}
	for _, text := range []string{"", "1 2 3 4 5 6", "1 2 3 4 5 6 x"} {
		if _, _, err := parseStat(text); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
