package ebpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"runtime"
	"testing"

	"pgregory.net/rapid"

	"farside/internal/capture"
	"farside/internal/dr"
)

// fakeRing is a ring with the kernel's side in Go.
type fakeRing struct {
	ring
}

func newFakeRing(size int) *fakeRing {
	f := &fakeRing{}
	f.ring = ring{consumer: new(uint64), producer: new(uint64), data: make([]byte, size), size: uint64(size)}
	return f
}

// put appends a record as the kernel does and reports whether there was room.
func (f *fakeRing) put(rec []byte, flags uint32) bool {
	total := (recordHeader + len(rec) + 7) &^ 7
	if *f.producer+uint64(total)-*f.consumer > f.size {
		return false
	}
	whole := make([]byte, total)
	binary.LittleEndian.PutUint32(whole, uint32(len(rec))|flags)
	copy(whole[recordHeader:], rec)
	for i, b := range whole {
		f.data[(*f.producer+uint64(i))%f.size] = b
	}
	*f.producer += uint64(total)
	return true
}

func TestRingBusy(t *testing.T) {
	f := newFakeRing(4096)
	f.put([]byte("discarded"), recordDiscarded)
	f.put([]byte("first"), 0)
	busy := *f.producer
	f.put([]byte("second"), recordBusy)
	f.put([]byte("third"), 0)
	if rec := f.next(); string(rec) != "first" {
		t.Fatalf("got %q", rec)
	}
	if rec := f.next(); rec != nil {
		t.Fatalf("got %q while it is being written", rec)
	}
	binary.LittleEndian.PutUint32(f.data[busy:], 6)
	for _, want := range []string{"second", "third"} {
		if rec := f.next(); string(rec) != want {
			t.Fatalf("got %q, want %q", rec, want)
		}
	}
	if rec := f.next(); rec != nil || *f.consumer != 0 {
		t.Fatalf("got %q, consumer at %d before release", rec, *f.consumer)
	}
	f.release(f.pos)
	if *f.consumer != *f.producer {
		t.Errorf("consumer at %d of %d", *f.consumer, *f.producer)
	}
}

// TestRingModel: what goes in comes out, in order, whatever the sizes.
func TestRingModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := newFakeRing(4096)
		var want [][]byte
		for i := range rapid.IntRange(1, 200).Draw(t, "steps") {
			if rapid.Bool().Draw(t, "put?") {
				rec := bytes.Repeat([]byte{byte(i)}, rapid.IntRange(0, 1500).Draw(t, "size"))
				flags := rapid.SampledFrom([]uint32{0, 0, 0, recordDiscarded}).Draw(t, "flags")
				if f.put(rec, flags) && flags == 0 {
					want = append(want, rec)
				}
				continue
			}
			rec := f.next()
			if len(want) == 0 {
				if rec != nil {
					t.Fatalf("got %d bytes from an empty ring", len(rec))
				}
			} else {
				if !bytes.Equal(rec, want[0]) {
					t.Fatalf("got %d bytes, want %d", len(rec), len(want[0]))
				}
				want = want[1:]
			}
			if rapid.Bool().Draw(t, "release?") {
				f.release(f.pos)
			}
		}
	})
}

func record(offset, time uint64, length uint32, watch, kind uint16, data []byte) []byte {
	rec := make([]byte, headerSize, headerSize+len(data))
	binary.LittleEndian.PutUint64(rec, offset)
	binary.LittleEndian.PutUint64(rec[8:], time)
	binary.LittleEndian.PutUint32(rec[16:], length)
	binary.LittleEndian.PutUint16(rec[20:], watch)
	binary.LittleEndian.PutUint16(rec[22:], kind)
	return append(rec, data...)
}

var testDisks = []capture.Disk{{ID: 5, Size: 1 << 20}, {ID: 2, Size: 1 << 16}}

func TestParseRecord(t *testing.T) {
	data := bytes.Repeat([]byte("x"), 4096)
	for _, c := range []struct {
		name string
		rec  []byte
		want capture.Event
	}{
		{"data", record(512, 7, 1024, 0, kindData, data), capture.Event{
			Kind: capture.Change, Extent: dr.Extent{Disk: 5, Offset: 512, Length: 1024}, What: dr.Data, Time: 7, Data: data[:1024],
		}},
		{"zero", record(0, 8, 1<<16, 1, kindZero, nil), capture.Event{
			Kind: capture.Change, Extent: dr.Extent{Disk: 2, Length: 1 << 16}, What: dr.Zero, Time: 8,
		}},
		{"discard", record(4096, 9, 512, 1, kindDiscard, nil), capture.Event{
			Kind: capture.Change, Extent: dr.Extent{Disk: 2, Offset: 4096, Length: 512}, What: dr.Discard, Time: 9,
		}},
		{"flush", record(0, 10, 0, 0, kindFlush, nil), capture.Event{Kind: capture.Flush, Extent: dr.Extent{Disk: 5}, Time: 10}},
	} {
		got, err := parseRecord(c.rec, testDisks)
		if err != nil || got.Kind != c.want.Kind || got.Extent != c.want.Extent || got.What != c.want.What ||
			got.Time != c.want.Time || !bytes.Equal(got.Data, c.want.Data) {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
	}
	for name, rec := range map[string][]byte{
		"short":         make([]byte, headerSize-1),
		"foreign disk":  record(0, 0, 512, 2, kindZero, nil),
		"unknown kind":  record(0, 0, 512, 0, 9, nil),
		"too much data": record(0, 0, 8192, 0, kindData, data),
		"behind end":    record(1<<20, 0, 512, 0, kindZero, nil),
		"negative":      record(1<<63, 0, 512, 0, kindZero, nil),
	} {
		if _, err := parseRecord(rec, testDisks); !errors.Is(err, dr.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzRecord: no record makes an event that leaves its disk or its bytes.
func FuzzRecord(f *testing.F) {
	f.Add(record(512, 7, 1024, 0, kindData, make([]byte, 4096)))
	f.Add(record(0, 8, 1<<16, 1, kindZero, nil))
	f.Add(record(0, 10, 0, 0, kindFlush, nil))
	f.Fuzz(func(t *testing.T, rec []byte) {
		e, err := parseRecord(rec, testDisks)
		if err != nil {
			if !errors.Is(err, dr.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		size := map[dr.DiskID]int64{5: 1 << 20, 2: 1 << 16}[e.Extent.Disk]
		if e.Extent.Offset < 0 || e.Extent.Length < 0 || e.Extent.End() > size {
			t.Fatalf("event of %v", e.Extent)
		}
		if e.What == dr.Data && int64(len(e.Data)) != e.Extent.Length || len(e.Data) > len(rec) {
			t.Fatalf("event of %v with %d bytes", e.Extent, len(e.Data))
		}
	})
}

func TestOptions(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		o             Options
		total, memory int64
		ring, block   int64 // 0: refused
	}{
		{Options{}, 100 * gib, 16 * gib, 256 << 20, 4096},
		{Options{}, 256 * gib, 8 * gib, 256 << 20, 4096},
		{Options{}, 257 * gib, 4 * gib, 128 << 20, 8192},
		{Options{}, 16 << 40, 1 * gib, 32 << 20, 256 << 10},
		{Options{}, 1 * gib, 0, minRing, 4096},
		{Options{RingBytes: 1 << 20, BlockSize: 512}, gib, gib, 1 << 20, 512},
		{Options{RingBytes: 1 << 31}, gib, gib, 0, 0},
		{Options{RingBytes: 4096}, gib, gib, 0, 0},
		{Options{RingBytes: 3 << 20}, gib, gib, 0, 0},
		{Options{BlockSize: 256}, gib, gib, 0, 0},
		{Options{BlockSize: 5000}, gib, gib, 0, 0},
	} {
		got, err := c.o.withDefaults(c.total, c.memory)
		if c.ring == 0 {
			if !errors.Is(err, dr.ErrInvalid) {
				t.Errorf("%+v: %v", c.o, err)
			}
			continue
		}
		if err != nil || got.RingBytes != c.ring || got.BlockSize != c.block {
			t.Errorf("%+v for %d bytes, %d of memory: %+v, %v", c.o, c.total, c.memory, got, err)
		}
	}
}

func TestOpenElsewhere(t *testing.T) {
	if runtime.GOOS == "linux" && runtime.GOARCH == "amd64" {
		t.Skip("skipped: needs a platform without the driver")
	}
	if _, err := Open([]capture.Disk{{ID: 1, Path: "disk"}}, Options{}); !errors.Is(err, dr.ErrUnsupported) {
		t.Errorf("open: %v", err)
	}
}

// FuzzRing reads a ring whose memory says anything: it ends, and stays within bounds.
func FuzzRing(f *testing.F) {
	f.Add([]byte{8, 0, 0, 0}, uint64(64), uint64(0))
	f.Add(bytes.Repeat([]byte{255, 255, 255, 63}, 100), uint64(4096), uint64(8))
	f.Fuzz(func(t *testing.T, content []byte, producer, from uint64) {
		r := newFakeRing(4096).ring
		copy(r.data, content)
		from &= 1<<20 - 8
		producer = from + min(producer&^7, r.size)
		*r.producer, r.pos = producer, from
		for r.next() != nil {
			if r.pos <= from {
				t.Fatal("the ring does not move")
			}
		}
		r.begins(from, producer)
	})
}
