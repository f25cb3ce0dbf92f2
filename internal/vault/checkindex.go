package vault

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"farside/internal/dr"
	"farside/internal/frame"
)

// indexCheck compares what the index holds with what the segments say that it
// should.
type indexCheck struct {
	*checker
	x    *index
	want int // changes that must be there
	tags int
}

// index checks the index. Segments with findings are left out: what they
// should have in it is not known.
func (c *checker) index(ctx context.Context) error {
	cache := NewCache(8 << 20)
	defer cache.Close()
	dir := indexPath(c.dir)
	if _, err := c.fs.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		c.find(indexDir, -1, errors.New("is missing; opening the vault rebuilds it"))
		return nil
	}
	x, err := tryIndex(c.fs, dir, cache, true)
	if err != nil {
		c.find(indexDir, -1, err)
		return nil
	}
	k := &indexCheck{checker: c, x: x}
	err = k.check(ctx)
	if err := errors.Join(err, ctx.Err()); err != nil {
		if ctx.Err() != nil {
			return errors.Join(err, x.close())
		}
		c.find(indexDir, -1, err)
	}
	return x.close()
}

func (k *indexCheck) check(ctx context.Context) error {
	if !k.x.hasForm() {
		return errors.New("is of an unknown form; opening the vault rebuilds it")
	}
	if err := k.x.readLines(); err != nil {
		return err
	}
	for _, t := range k.m.Timelines {
		if mark, end := k.x.mark(t.ID), k.ends[t.ID].Position.Seq; mark > end {
			k.find(segmentDir(t.ID), -1, fmt.Errorf("the log ends at %d but was durable through %d", end, mark))
		}
	}
	segs := newSegments(k.fs, k.dir, nil)
	defer segs.close()
	spans := map[dr.Timeline][]span{}
	for _, key := range k.whole {
		mark := k.x.mark(key.Timeline)
		err := segs.each(key, func(p placedFrame) error {
			if err := ctx.Err(); err != nil || p.frame.Last > mark {
				return err
			}
			spans[key.Timeline] = append(spans[key.Timeline], frameSpan(&p.frame.Header))
			return k.frame(p)
		})
		if err != nil {
			return err
		}
	}
	if len(k.whole) < k.report.Segments {
		return nil // then there is more in the index than can be told right
	}
	for tl, want := range spans {
		got, err := k.x.spans(tl, want[0].First, want[len(want)-1].Last)
		if err != nil {
			return err
		}
		if !slices.Equal(joinSpans(got), joinSpans(want)) {
			k.find(indexDir, -1, fmt.Errorf("the spans of timeline %d are wrong", tl))
		}
	}
	return k.count()
}

// frame checks that the keys of a frame are there.
func (k *indexCheck) frame(p placedFrame) error {
	var key, value []byte
	missing := 0
	err := eachChange(p.frame, p.segment, p.off, func(ck changeKey, c change) error {
		k.want++
		key, value = ck.append(key[:0]), c.append(value[:0])
		ok, err := k.has(key, value)
		if !ok {
			missing++
		}
		return err
	})
	if err == nil && p.frame.Kind == frame.TagKind {
		err = k.tag(p.frame)
	}
	if missing > 0 {
		k.find(indexDir, -1, fmt.Errorf("%d keys of the frame at %d of %s are missing or wrong",
			missing, p.off, segmentPath(segmentKey{p.frame.Timeline, p.segment})))
	}
	return err
}

func (k *indexCheck) tag(f *frame.Frame) error {
	t, err := f.Tag()
	if err != nil {
		return err
	}
	k.tags++
	ok, err := k.has(tagKey(f.Timeline, f.Last), tagValue(t, f.LastTime))
	if !ok {
		k.find(indexDir, -1, fmt.Errorf("the tag at %d:%d is missing or wrong", f.Timeline, f.Last))
	}
	return err
}

// has reports whether the index maps key to value.
func (k *indexCheck) has(key, value []byte) (bool, error) {
	got, closer, err := k.x.db.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer closer.Close()
	return bytes.Equal(got, value), nil
}

// count finds keys that nothing accounts for. Those of folded frames and of
// discarded branches are left over and mean nothing.
func (k *indexCheck) count() error {
	live := func(tl dr.Timeline, seq dr.Seq) bool {
		_, ok := k.m.timeline(tl)
		return ok && (tl != k.m.BaseTimeline || seq > k.m.Base)
	}
	changes, tags := 0, 0
	err := k.x.scan([]byte{classChange}, []byte{classSpan}, func(key, value []byte) error {
		ck, err := decodeChangeKey(key)
		if err == nil {
			_, err = decodeChange(value)
		}
		if err == nil && live(ck.Timeline, ck.Seq) {
			changes++
		}
		return err
	})
	if err != nil {
		return err
	}
	err = k.x.scan([]byte{classTag}, []byte{classTag + 1}, func(key, value []byte) error {
		t, err := decodeTag(key, value)
		if err == nil && live(t.Position.Timeline, t.Position.Seq) {
			tags++
		}
		return err
	})
	if err != nil {
		return err
	}
	k.report.Keys = changes
	if changes != k.want || tags != k.tags {
		k.find(indexDir, -1, fmt.Errorf("holds %d changes and %d tags, the segments %d and %d", changes, tags, k.want, k.tags))
	}
	return nil
}
