package vault

import (
	"errors"
	"testing"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

// A tag that was withdrawn is no point of its name any more; where it stood stays one.
func TestRevokedTags(t *testing.T) {
	machine := dr.NewMachineID()
	v, err := Create(vfs.NewMem(), "v", machine, testDisks, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	l := v.Log()
	s := newSource(1, v.Head())
	put := func(id byte, c dr.Consistency, name string) dr.Position {
		s.now += 100
		f := s.finish(s.enc.Tag(dr.Tag{ID: [16]byte{id}, Group: [16]byte{id}, Consistency: c, Name: name}, s.now, false))
		if err := l.Append(f); err != nil {
			t.Fatal(err)
		}
		return f.End().Position
	}
	kept := put(1, dr.FileSystem, "kept")
	gone := put(2, dr.FileSystem, "gone")
	withdrawal := put(2, dr.Revoked, "gone")
	put(3, dr.Revoked, "of nothing")
	if _, err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	tags, err := v.Tags()
	if err != nil || len(tags) != 1 || tags[0].Position != kept || tags[0].Name != "kept" {
		t.Errorf("tags %+v, %v", tags, err)
	}
	if _, err := v.Resolve(SelectTag("gone")); !errors.Is(err, dr.ErrNoPoint) {
		t.Errorf("resolved a withdrawn tag: %v", err)
	}
	if p, err := v.Resolve(SelectPosition(gone)); err != nil || p.Consistency != dr.FileSystem {
		t.Errorf("where it stood: %+v, %v", p, err)
	}
	if p, err := v.Resolve(SelectPosition(withdrawal)); err != nil || p.Consistency != dr.Crash || p.Tag != "" {
		t.Errorf("where it was withdrawn: %+v, %v", p, err)
	}
}

// A sync is one span, whatever takes turns in it.
func TestASyncIsOneSpan(t *testing.T) {
	v, err := Create(vfs.NewMem(), "v", dr.NewMachineID(), testDisks, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	s := newSource(1, v.Head())
	for _, f := range []struct {
		kind     frame.Kind
		accuracy dr.Accuracy
		open     bool
	}{
		{frame.Changes, dr.Exact, false},
		{frame.Changes, dr.Exact, true},
		{frame.Resync, dr.Epoch, true},
		{frame.Changes, dr.Exact, true},
		{frame.Resync, dr.Epoch, true},
		{frame.Changes, dr.Exact, false},
	} {
		if err := v.Log().Append(s.frame(f.kind, f.accuracy, f.open, 2)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := v.Log().Sync(); err != nil {
		t.Fatal(err)
	}
	spans, err := v.Spans()
	if err != nil || len(spans) != 3 || !spans[1].Open || spans[1].Accuracy != dr.Epoch ||
		spans[1].First.Seq != spans[0].Last.Seq+1 || spans[1].Last.Seq != spans[2].First.Seq-1 || spans[1].FirstTime >= spans[1].LastTime {
		t.Errorf("spans %+v, %v", spans, err)
	}
}
