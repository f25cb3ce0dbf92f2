package frame

import (
	"bytes"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"farside/internal/dr"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var machine = dr.MachineID{0xfa, 0x25, 0x1d, 0xe0, 15: 1}

func start() Cursor {
	return Cursor{Machine: machine, Position: dr.Position{Timeline: 1}}
}

// fill returns n bytes; every second block of 64 KiB can be compressed.
func fill(n int, seed uint64) []byte {
	rng := rand.New(rand.NewPCG(seed, 7))
	b := make([]byte, n)
	for i := range b {
		if i/BlockSize%2 == 0 {
			b[i] = byte(rng.Uint32())
		} else {
			b[i] = byte(i / 1000)
		}
	}
	return b
}

type change struct {
	x    dr.Extent
	what dr.What
	time int64
	data []byte
}

func sample() []change {
	return []change{
		{dr.Extent{Disk: 1, Offset: 4096, Length: 8192}, dr.Data, 1_000, fill(8192, 1)},
		{dr.Extent{Disk: 2, Offset: 1 << 40, Length: 1 << 40}, dr.Discard, 900, nil}, // an earlier clock
		{dr.Extent{Disk: 1, Offset: 512, Length: 512}, dr.Zero, 1_200, nil},
		{dr.Extent{Disk: 1, Offset: 0, Length: 300 * 512}, dr.Data, 5_000_000_000, fill(300*512, 2)},
	}
}

func encodeSample(t testing.TB, codec Codec) []byte {
	t.Helper()
	e := NewEncoder(start(), codec)
	e.Begin(Changes, dr.Exact, false)
	for _, c := range sample() {
		if _, err := e.Add(c.x, c.what, c.time, c.data); err != nil {
			t.Fatal(err)
		}
	}
	b, err := e.Finish()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRoundTrip(t *testing.T) {
	for _, codec := range []Codec{None, Zstd, S2} {
		t.Run(codec.String(), func(t *testing.T) {
			f, err := Parse(encodeSample(t, codec))
			if err != nil {
				t.Fatal(err)
			}
			checkSample(t, f)
			if err := f.VerifyChain([32]byte{}); err != nil {
				t.Error(err)
			}
			if err := f.VerifyChain([32]byte{1}); !errors.Is(err, dr.ErrCorrupt) {
				t.Errorf("chain after another frame: %v", err)
			}
			if codec != None && f.StoredLen >= f.RawLen*9/10 {
				t.Errorf("stored %d of %d raw bytes: not compressed", f.StoredLen, f.RawLen)
			}
		})
	}
}

func checkSample(t *testing.T, f *Frame) {
	t.Helper()
	raw, err := f.Payload(nil)
	if err != nil {
		t.Fatal(err)
	}
	last := int64(0)
	for i, want := range sample() {
		got := f.Extent(i)
		last = max(last, want.time)
		if got.Extent != want.x || got.What != want.what || got.Time != last || got.Seq != dr.Seq(i+1) {
			t.Errorf("extent %d: got %+v, want %+v", i, got, want.x)
		}
		if want.data != nil && !bytes.Equal(raw[got.RawOff:][:got.Length], want.data) {
			t.Errorf("extent %d: data differs", i)
		}
	}
	var again []byte
	for i := range f.NumBlocks() {
		off, n, rawOff, rawLen := f.Block(i)
		part, err := f.DecodeBlock(i, f.Bytes()[off:off+int64(n)], nil)
		if err != nil || !bytes.Equal(part, raw[rawOff:rawOff+rawLen]) {
			t.Errorf("block %d alone differs: %v", i, err)
		}
		again = append(again, part...)
	}
	if !bytes.Equal(again, raw) {
		t.Error("blocks differ from payload")
	}
}

func TestRecodeKeepsChainAndContent(t *testing.T) {
	plain := encodeSample(t, None)
	f, _ := Parse(plain)
	for _, codec := range []Codec{Zstd, S2} {
		packed, err := f.Recode(codec)
		if err != nil {
			t.Fatal(err)
		}
		g, err := Parse(packed)
		if err != nil {
			t.Fatal(err)
		}
		if g.Chain != f.Chain || g.VerifyChain([32]byte{}) != nil || len(packed) >= len(plain) {
			t.Errorf("%v: chain or size wrong", codec)
		}
		checkSample(t, g)
		if back, err := g.Recode(None); err != nil || !bytes.Equal(back, plain) {
			t.Errorf("%v: recoding back does not give the same bytes: %v", codec, err)
		}
	}
}

func TestTagAndHeartbeat(t *testing.T) {
	e := NewEncoder(start(), Zstd)
	want := dr.Tag{ID: [16]byte{1}, Group: [16]byte{2}, Consistency: dr.FileSystem, Name: "vor dem Umzug ☂"}
	b, err := e.Tag(want, 77, false)
	if err != nil {
		t.Fatal(err)
	}
	f, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := f.Tag(); err != nil || got != want {
		t.Errorf("tag %+v, %v", got, err)
	}
	b, _ = e.Heartbeat(50, true)
	g, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if g.LastTime != 77 || g.Prev != 1 || g.Last != 2 || !g.Open || g.Check(f.End()) != nil || g.VerifyChain(f.Chain) != nil {
		t.Errorf("heartbeat %+v", g.Header)
	}
	for _, bad := range []dr.Tag{{Consistency: dr.Crash, Name: strings.Repeat("x", 256)}, {Name: "no consistency"}, {Consistency: dr.Crash, Name: "\xff"}} {
		if _, err := e.Tag(bad, 0, false); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("tag %q: %v", bad.Name, err)
		}
	}
}

func TestCheck(t *testing.T) {
	f, _ := Parse(encodeSample(t, None)) // (0,4] of timeline 1
	cases := []struct {
		name string
		edit func(*Cursor)
		want error
	}{
		{"continues", func(*Cursor) {}, nil},
		{"repeat", func(c *Cursor) { c.Position.Seq = 4 }, dr.ErrRepeat},
		{"overlap", func(c *Cursor) { c.Position.Seq = 2 }, dr.ErrCorrupt},
		{"timeline", func(c *Cursor) { c.Position.Timeline = 2 }, dr.ErrTimeline},
		{"machine", func(c *Cursor) { c.Machine[0]++ }, dr.ErrDenied},
		{"time", func(c *Cursor) { c.Time = 1_001 }, dr.ErrCorrupt},
	}
	for _, tc := range cases {
		c := start()
		tc.edit(&c)
		if err := f.Check(c); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
	e := NewEncoder(f.End(), None)
	b, _ := e.Heartbeat(0, false)
	g, _ := Parse(b)
	if err := g.Check(start()); !errors.Is(err, dr.ErrGap) {
		t.Errorf("gap: %v", err)
	}
}

func TestAddRefuses(t *testing.T) {
	e := NewEncoder(start(), None)
	e.Begin(Changes, dr.Exact, false)
	sector := make([]byte, 512)
	for name, c := range map[string]change{
		"unaligned offset": {dr.Extent{Offset: 1, Length: 512}, dr.Data, 0, sector},
		"unaligned length": {dr.Extent{Length: 100}, dr.Data, 0, sector[:100]},
		"empty":            {dr.Extent{}, dr.Data, 0, nil},
		"negative":         {dr.Extent{Offset: -512, Length: 512}, dr.Data, 0, sector},
		"data missing":     {dr.Extent{Length: 512}, dr.Data, 0, nil},
		"data with zero":   {dr.Extent{Length: 512}, dr.Zero, 0, sector},
		"unknown what":     {dr.Extent{Length: 512}, 9, 0, nil},
		"too long":         {dr.Extent{Length: 1<<32*512 + 512}, dr.Zero, 0, nil},
	} {
		if _, err := e.Add(c.x, c.what, c.time, c.data); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if b, err := e.Finish(); b != nil || err != nil {
		t.Errorf("empty frame: %d bytes, %v", len(b), err)
	}
	e.Begin(Changes, dr.Exact, false)
	mib := make([]byte, MaxData)
	for range MaxRaw / MaxData {
		if _, err := e.Add(dr.Extent{Length: MaxData}, dr.Data, 0, mib); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := e.Add(dr.Extent{Length: 512}, dr.Data, 0, sector); !errors.Is(err, dr.ErrFull) {
		t.Errorf("beyond MaxRaw: %v", err)
	}
}

// Every single-byte change of a frame is detected by Parse, Verify or VerifyChain.
func TestEveryFlippedByteIsDetected(t *testing.T) {
	for _, codec := range []Codec{None, Zstd} {
		good := encodeSample(t, codec)
		for i := range good {
			if i > 400 && i%37 != 0 && i < len(good)-100 {
				continue
			}
			b := bytes.Clone(good)
			b[i] ^= 1 << (i % 8)
			if f, err := Parse(b); err == nil && f.Verify() == nil {
				t.Fatalf("%v: flip in byte %d not detected", codec, i)
			}
		}
		for n := range len(good) {
			if n%91 == 0 {
				if _, err := Parse(good[:n]); !errors.Is(err, dr.ErrCorrupt) {
					t.Fatalf("truncated to %d: %v", n, err)
				}
			}
		}
	}
}

func TestVersionIsItsOwnError(t *testing.T) {
	b := encodeSample(t, None)
	b[4] = 2
	if _, err := Parse(b); !errors.Is(err, dr.ErrVersion) {
		t.Error(err)
	}
}

func TestGolden(t *testing.T) {
	e := NewEncoder(start(), None)
	e.Begin(Changes, dr.Exact, false)
	for _, c := range sample() {
		e.Add(c.x, c.what, c.time, c.data)
	}
	changes, _ := e.Finish()
	tag, _ := e.Tag(dr.Tag{ID: [16]byte{9}, Consistency: dr.Application, Name: "nightly"}, 6_000_000_000, false)
	beat, _ := e.Heartbeat(7_000_000_000, true)
	f, _ := Parse(changes)
	packed, _ := f.Recode(Zstd)
	for name, b := range map[string][]byte{"changes": changes, "changes-zstd": packed, "tag": tag, "heartbeat": beat} {
		path := filepath.Join("testdata", name+".frame")
		if *update {
			if err := os.WriteFile(path, b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		g, err := Parse(want)
		if err != nil || g.Verify() != nil {
			t.Fatalf("%s: an old file must stay readable: %v", name, err)
		}
		// The output of the compressor may change with its version; its meaning may not.
		if name != "changes-zstd" && !bytes.Equal(b, want) {
			t.Errorf("%s: the bytes of the format changed: raise the version", name)
		}
	}
}

func TestStreamProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := start()
		e := NewEncoder(c, Codec(rapid.IntRange(0, 2).Draw(t, "codec")))
		for range rapid.IntRange(1, 12).Draw(t, "frames") {
			b := drawFrame(t, e)
			f, err := Parse(b)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Check(c); err != nil {
				t.Fatal(err)
			}
			if err := f.VerifyChain(c.Chain); err != nil {
				t.Fatal(err)
			}
			if c = f.End(); c != e.Cursor() {
				t.Fatalf("cursor %+v, encoder %+v", c, e.Cursor())
			}
			short, err := ParseTables(b[:f.TablesSize()])
			if err != nil || short.NumBlocks() != f.NumBlocks() {
				t.Fatalf("tables alone: %v", err)
			}
			if _, err := short.Payload(nil); f.RawLen > 0 && !errors.Is(err, dr.ErrInvalid) {
				t.Fatalf("payload without bytes: %v", err)
			}
		}
	})
}

func drawFrame(t *rapid.T, e *Encoder) []byte {
	now := rapid.Int64Range(0, 1<<40).Draw(t, "time")
	if rapid.IntRange(0, 5).Draw(t, "beat") == 0 {
		b, _ := e.Heartbeat(now, rapid.Bool().Draw(t, "open"))
		return b
	}
	e.Begin(Changes, dr.Exact, false)
	for i := range rapid.IntRange(1, 9).Draw(t, "extents") {
		x := dr.Extent{
			Disk:   dr.DiskID(rapid.IntRange(0, 3).Draw(t, "disk")),
			Offset: 512 * rapid.Int64Range(0, 1<<30).Draw(t, "off"), Length: 512 * rapid.Int64Range(1, 200).Draw(t, "len"),
		}
		what, data := dr.Zero, []byte(nil)
		if rapid.Bool().Draw(t, "data") {
			what, data = dr.Data, fill(int(x.Length), uint64(i))
		}
		if _, err := e.Add(x, what, now+int64(i), data); err != nil {
			t.Fatal(err)
		}
	}
	b, _ := e.Finish()
	return b
}

func FuzzParse(f *testing.F) {
	for _, codec := range []Codec{None, Zstd, S2} {
		e := NewEncoder(start(), codec) // small: the fuzzer copies its inputs often
		e.Begin(Changes, dr.Exact, false)
		e.Add(dr.Extent{Disk: 1, Length: 1024}, dr.Data, 5, bytes.Repeat([]byte{7}, 1024))
		e.Add(dr.Extent{Disk: 1, Offset: 512, Length: 512}, dr.Zero, 6, nil)
		b, _ := e.Finish()
		f.Add(b, false)
	}
	e := NewEncoder(start(), None)
	b, _ := e.Tag(dr.Tag{Consistency: dr.Crash, Name: "x"}, 0, false)
	f.Add(b, true)
	f.Fuzz(func(t *testing.T, b []byte, repair bool) {
		if repair { // get past the checksums, so that the bounds behind them are tried
			b = repaired(b)
		}
		fr, err := Parse(b)
		if err != nil {
			if !errors.Is(err, dr.ErrCorrupt) && !errors.Is(err, dr.ErrVersion) {
				t.Fatalf("error of no kind: %v", err)
			}
			return
		}
		for _, x := range fr.All() {
			if x.Length <= 0 || x.End() < x.Offset || x.Seq < fr.First || x.Seq > fr.Last {
				t.Fatalf("accepted %+v", x)
			}
		}
		if p, err := fr.Payload(nil); err == nil && len(p) != fr.RawLen {
			t.Fatalf("payload of %d bytes, header says %d", len(p), fr.RawLen)
		}
		fr.Tag()
		fr.VerifyChain([32]byte{})
	})
}

// repaired returns b with right checksums wherever they can be told.
func repaired(b []byte) []byte {
	if len(b) < HeaderSize {
		return b
	}
	b = bytes.Clone(b)
	h := Header{Extents: int(le.Uint32(b[72:])), RawLen: int(le.Uint32(b[76:]))}
	if h.Extents <= MaxExtents && h.RawLen <= MaxRaw && h.TablesSize() <= len(b) {
		le.PutUint32(b[152:], checksum(b[HeaderSize:h.TablesSize()]))
	}
	le.PutUint32(b[156:], checksum(b[:156]))
	return b
}

func BenchmarkEncode(b *testing.B) {
	for _, codec := range []Codec{None, Zstd} {
		b.Run(codec.String(), func(b *testing.B) {
			data := fill(1<<20, 3)
			e := NewEncoder(start(), codec)
			b.SetBytes(1 << 20)
			for b.Loop() {
				e.Begin(Changes, dr.Exact, false)
				for off := 0; off < len(data); off += BlockSize {
					e.Add(dr.Extent{Offset: int64(off), Length: BlockSize}, dr.Data, 0, data[off:off+BlockSize])
				}
				e.Finish()
			}
		})
	}
}

func BenchmarkVerifyChain(b *testing.B) {
	f, _ := Parse(encodeSample(b, None))
	b.SetBytes(int64(f.RawLen))
	for b.Loop() {
		if err := f.VerifyChain([32]byte{}); err != nil {
			b.Fatal(err)
		}
	}
}
