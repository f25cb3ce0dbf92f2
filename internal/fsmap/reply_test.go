package fsmap

import (
	"errors"
	"reflect"
	"testing"

	"farside/internal/dr"
	"farside/internal/extent"
)

const dev = 0x801

// reply returns what the kernel would answer.
func reply(rs ...record) []byte {
	b := make([]byte, headSize+len(rs)*recordSize)
	ne.PutUint32(b[4:], oflagDevT)
	ne.PutUint32(b[8:], uint32(len(rs)))
	ne.PutUint32(b[12:], uint32(len(rs)))
	for i, r := range rs {
		p := b[headSize+i*recordSize:]
		ne.PutUint32(p, r.dev)
		ne.PutUint32(p[4:], r.flags)
		ne.PutUint64(p[8:], r.physical)
		ne.PutUint64(p[16:], r.owner)
		ne.PutUint64(p[32:], r.length)
	}
	return b
}

func free(at, n uint64) record { return record{dev, flagSpecial, at, ownerFree, n} }

func used(at, n uint64) record { return record{dev, flagSpecial, at, 2, n} }

func newGatherer(size int64) *gatherer {
	return &gatherer{dev: dev, size: size, limit: 4, least: 10}
}

func gather(g *gatherer, b []byte) ([]extent.Range, error) {
	rs, err := parseReply(b)
	if err != nil {
		return nil, err
	}
	for _, r := range rs {
		if err := g.add(r); err != nil {
			return nil, err
		}
	}
	return g.done(), nil
}

func TestGather(t *testing.T) {
	for name, c := range map[string]struct {
		records []record
		want    []extent.Range
		err     error
	}{
		"none":           {nil, nil, nil},
		"full":           {[]record{used(0, 1000)}, nil, nil},
		"empty":          {[]record{free(0, 1000)}, []extent.Range{{Start: 0, End: 1000}}, nil},
		"touching":       {[]record{free(100, 5), free(105, 5), used(110, 1), free(111, 9)}, []extent.Range{{Start: 100, End: 110}}, nil},
		"a gap":          {[]record{free(100, 10), free(111, 10)}, []extent.Range{{Start: 100, End: 110}, {Start: 111, End: 121}}, nil},
		"a file's":       {[]record{{dev, 0, 100, ownerFree, 50}}, nil, nil},
		"shared":         {[]record{used(100, 50), used(120, 10), used(130, 50), free(180, 10)}, []extent.Range{{Start: 180, End: 190}}, nil},
		"the longest":    {[]record{free(0, 10), free(20, 20), free(50, 10), free(70, 40), free(120, 20)}, []extent.Range{{Start: 20, End: 40}, {Start: 70, End: 110}, {Start: 120, End: 140}}, nil},
		"another device": {[]record{free(0, 10), {dev + 1, flagSpecial, 0, 2, 10}}, nil, dr.ErrUnsupported},
		"beyond the end": {[]record{free(990, 11)}, nil, dr.ErrCorrupt},
		"far beyond":     {[]record{free(10, 1<<64-5)}, nil, dr.ErrCorrupt},
		"back":           {[]record{used(100, 10), used(99, 1)}, nil, dr.ErrCorrupt},
		"free and used":  {[]record{free(100, 10), used(109, 1)}, nil, dr.ErrCorrupt},
		"used and free":  {[]record{used(100, 10), free(109, 10)}, nil, dr.ErrCorrupt},
		"under shared":   {[]record{used(100, 50), used(110, 1), free(120, 10)}, nil, dr.ErrCorrupt},
		"twice free":     {[]record{free(100, 10), free(105, 20)}, nil, dr.ErrCorrupt},
	} {
		got, err := gather(newGatherer(1000), reply(c.records...))
		if !errors.Is(err, c.err) || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestParseReply(t *testing.T) {
	whole := reply(free(0, 10))
	for name, c := range map[string]struct {
		want   error
		change func(b []byte) []byte
	}{
		"short":           {dr.ErrCorrupt, func(b []byte) []byte { return b[:headSize-1] }},
		"records missing": {dr.ErrCorrupt, func(b []byte) []byte { return b[:len(b)-1] }},
		"far too many":    {dr.ErrCorrupt, func(b []byte) []byte { ne.PutUint32(b[12:], 1<<32-1); return b }},
		"device numbers":  {dr.ErrUnsupported, func(b []byte) []byte { ne.PutUint32(b[4:], 0); return b }},
	} {
		if _, err := parseReply(c.change(append([]byte(nil), whole...))); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestGoOn: the next question begins behind the last record of the answer before.
func TestGoOn(t *testing.T) {
	b := newQuestion()
	if goOn(b) {
		t.Error("nothing was answered, and something follows")
	}
	r := free(7, 9)
	copy(b[12:16], reply(r, r)[12:16])
	copy(b[headSize:], reply(used(0, 7), r)[headSize:])
	if !goOn(b) || ne.Uint64(b[lowKeyAt+8:]) != 7 || ne.Uint64(b[lowKeyAt+32:]) != 9 || ne.Uint64(b[highKeyAt+8:]) != 1<<64-1 {
		t.Errorf("goes on with % x", b[lowKeyAt:headSize])
	}
	r.flags |= flagLast
	copy(b[headSize:], reply(used(0, 7), r)[headSize:])
	if goOn(b) {
		t.Error("the last record is not the last")
	}
}

// FuzzReply: whatever is answered, what is called free lies within the volume, in order,
// is long enough and not too many, and nobody was said to use it.
func FuzzReply(f *testing.F) {
	f.Add(reply(free(0, 10), used(10, 5), free(15, 100)))
	f.Add(reply(used(0, 10), used(5, 20), free(25, 10), free(40, 10), free(60, 20), free(90, 30), free(130, 11)))
	f.Fuzz(func(t *testing.T, b []byte) {
		const size = 1 << 20
		g := newGatherer(size)
		got, err := gather(g, b)
		if err != nil {
			if !errors.Is(err, dr.ErrCorrupt) && !errors.Is(err, dr.ErrUnsupported) {
				t.Fatal(err)
			}
			return
		}
		var set extent.Set
		last := int64(-1)
		for _, r := range got {
			if r.Start <= last || r.Len() < 10 || r.End > size {
				t.Fatalf("ranges %v", got)
			}
			last = r.End
			set.Add(r.Start, r.End)
		}
		if len(got) > g.limit {
			t.Fatalf("%d ranges", len(got))
		}
		rs, err := parseReply(b)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rs {
			if !r.free() && r.length > 0 && set.Overlaps(int64(r.physical), int64(r.physical+r.length)) {
				t.Fatalf("%+v is used, and free are %v", r, got)
			}
		}
	})
}
