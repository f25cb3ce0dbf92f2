package agent

import (
	"errors"
	"io/fs"
	"log/slog"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

func TestVigil(t *testing.T) {
	block := func(disk dr.DiskID, n int64) dr.Extent {
		return dr.Extent{Disk: disk, Offset: n << 16, Length: 1 << 16}
	}
	var v vigil
	v.note(block(1, 0))
	if !v.take(block(1, 0)) {
		t.Error("what nobody watches counts as not written")
	}
	v.watch(block(1, 0))
	v.watch(block(1, 3))
	v.note(block(1, 1))
	v.note(block(2, 0))
	if v.take(block(1, 0)) || v.take(block(1, 3)) {
		t.Error("a write elsewhere counts")
	}
	v.note(dr.Extent{Disk: 1, Offset: 3<<16 - 512, Length: 1024})
	if v.take(block(1, 0)) || !v.take(block(1, 3)) || v.take(block(1, 3)) {
		t.Error("a write to the edge counts not once")
	}
	v.note(block(1, 0))
	v.watch(block(1, 0))
	if v.take(block(1, 0)) {
		t.Error("a write from before it is watched counts")
	}
	v.forget(block(1, 0))
	v.note(block(1, 0))
	if v.touched[1].Len() != 0 {
		t.Error("what is forgotten is noted")
	}
}

// A pass goes through all disks in order, wherever the one before stood, and notes how it ended.
func TestPasses(t *testing.T) {
	now := time.Unix(1000, 0)
	disks := []capture.Disk{{ID: 2, Size: glanceBytes + 512}, {ID: 5, Size: 2 * glanceBytes}}
	for name, at := range map[string]passes{
		"new":           {},
		"disk gone":     {Disk: 9, Offset: 7, Began: now},
		"disk shrunk":   {Disk: 5, Offset: 9 * glanceBytes, Began: now},
		"behind no end": {Disk: 2, Offset: 1 << 62, Began: now},
	} {
		kept := 0
		p := &patrol{background: &background{keep: func(*passes) { kept++ }}, disks: disks, now: func() time.Time { return now }}
		p.mu.passes = at
		var got []dr.Extent
		for range 4 {
			x := p.next()
			got = append(got, x)
			now = now.Add(time.Second)
			p.advance(x)
			if at := p.state(); at.Began.IsZero() {
				break
			}
		}
		if s := p.state(); s.Last.Ended != now || got[len(got)-1] != (dr.Extent{Disk: 5, Offset: glanceBytes, Length: glanceBytes}) || kept == 0 {
			t.Errorf("%s: %+v, %v, kept %d times", name, s, got, kept)
		}
		if name == "new" && len(got) != 4 {
			t.Errorf("%v", got)
		}
	}
	p := &patrol{background: &background{}, now: time.Now}
	if x := p.next(); x.Length != 0 {
		t.Errorf("without disks: %v", x)
	}
	b := &background{every: time.Hour}
	if r := b.rate(3600 << 20); r != 1<<20 || b.rate(1<<20) != backgroundLeast || (&background{}).rate(1<<40) != 0 {
		t.Errorf("rate %d", r)
	}
}

// files is a keeper in memory.
type files map[string][]byte

func (f files) Keep(name string, content []byte) error { f[name] = content; return nil }

func (f files) Kept(name string) ([]byte, error) {
	if b, ok := f[name]; ok {
		return b, nil
	}
	return nil, fs.ErrNotExist
}

func TestPassesAreKept(t *testing.T) {
	k := files{}
	b := newBackground(time.Hour, k, slog.New(slog.DiscardHandler))
	want := passes{Disk: 3, Offset: 5 << 20, Began: time.Unix(5, 0).UTC(), Done: 9, Found: 1, Last: fullPass{Found: 2}}
	b.keep(&want)
	if got := newBackground(time.Hour, k, slog.New(slog.DiscardHandler)).state(); got != want {
		t.Errorf("%+v", got)
	}
	k[passesFile] = []byte("{\"offset\": -1}")
	if got := newBackground(time.Hour, k, slog.New(slog.DiscardHandler)).state(); got != (passes{}) {
		t.Errorf("%+v", got)
	}
}

func FuzzParsePasses(f *testing.F) {
	f.Add([]byte(`{"disk":1,"offset":65536,"began":"2026-01-02T03:04:05Z","done":3,"found":0,"last":{"found":1}}`))
	f.Add([]byte("[]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parsePasses(b)
		if err != nil {
			if !errors.Is(err, dr.ErrCorrupt) || p != (passes{}) {
				t.Errorf("%+v, %v", p, err)
			}
			return
		}
		x := &patrol{background: &background{}, disks: []capture.Disk{{ID: 1, Size: 3 * glanceBytes}}, now: time.Now}
		x.mu.passes = p
		if n := x.next(); n.Disk != 1 || n.Offset < 0 || n.End() > 3*glanceBytes || n.Length <= 0 {
			t.Errorf("%+v: %v", p, n)
		}
	})
}
