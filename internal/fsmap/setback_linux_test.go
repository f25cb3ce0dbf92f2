//go:build linux && amd64

package fsmap

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"farside/test/load"
)

// tree makes directories with files, whose blocks of metadata reach the journal, not yet their place.
func (p *place) tree(name string, dirs int) {
	p.t.Helper()
	for i := range dirs {
		dir := filepath.Join(p.mount, fmt.Sprintf("%s%d", name, i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			p.t.Fatal(err)
		}
		for k := range 60 {
			file := filepath.Join(dir, fmt.Sprintf("a-file-with-a-long-name-to-fill-the-directory-%s-%d", name, k))
			if err := os.WriteFile(file, []byte(name), 0o600); err != nil {
				p.t.Fatal(err)
			}
		}
	}
	p.sync()
}

// image reads the whole disk.
func (p *place) image() []byte {
	p.t.Helper()
	b, err := os.ReadFile(p.loop.File)
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

// again mounts the disk with another content.
func (p *place) again(b []byte) {
	p.t.Helper()
	if err := p.unmount(); err != nil {
		p.t.Fatal(err)
	}
	if err := p.loop.Close(); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(p.loop.File, b, 0o600); err != nil {
		p.t.Fatal(err)
	}
	l, err := load.NewLoop(p.loop.File, 0)
	if err != nil {
		p.t.Fatal(err)
	}
	*p.loop = *l
	if p.unmount, err = p.loop.Mount(p.mount); err != nil {
		p.t.Fatal(err)
	}
}

// TestSetBack: the disk is set back to a snapshot, and the far side has seen more: what it keeps in
// free blocks is of the future. The recovery of ext4 does not mind. That of xfs does, which is why Kind.Blind
// says so.
func TestSetBack(t *testing.T) {
	t.Parallel()
	for _, kind := range []Kind{Ext4, XFS} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			p := newPlace(t, kind)
			right := p.setBack("one")
			for try := 0; kind == XFS && right && try < 3; try++ {
				// On a slow machine the journal's blocks may have reached their places.
				right = p.setBack(fmt.Sprintf("again%d", try))
			}
			if right != kind.Blind() {
				t.Errorf("the copy is right: %v, and the recovery is blind: %v", right, kind.Blind())
			}
		})
	}
}

// settled returns the whole disk when everything has reached its place.
func (p *place) settled() []byte {
	p.t.Helper()
	thaw, err := load.Freeze(p.mount)
	if err != nil {
		p.t.Fatal(err)
	}
	b := p.image()
	if err := thaw(); err != nil {
		p.t.Fatal(err)
	}
	return b
}

// setBack sets the disk back, goes on from there, and reports whether the files of a copy are right
// whose free blocks are of the future.
func (p *place) setBack(name string) bool {
	p.t.Helper()
	snapshot := p.settled()
	for i := range 4 {
		p.tree(fmt.Sprintf("%s-future%d-", name, i), 20)
	}
	future := p.settled()
	p.again(snapshot)

	begin := p.image()
	m := p.take(NewTaker())
	p.tree(name+"-present", 40)
	now := p.image()
	copied := &image{b: bytes.Clone(now)}
	for off := int64(0); off < p.size; off += 4096 {
		end := off + 4096
		if m.Free.Contains(off, end) && bytes.Equal(begin[off:end], now[off:end]) {
			copy(copied.b[off:end], future[off:end])
		}
	}
	want, err := p.contents(&image{b: now})
	if err != nil {
		p.t.Fatal(err)
	}
	got, err := p.contents(copied)
	p.t.Logf("%s: %d of %d files differ, %v", p.kind, len(differences(got, want)), len(want), err)
	return err == nil && maps.Equal(got, want)
}
