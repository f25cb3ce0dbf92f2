package vault

import (
	"bytes"
	"errors"
	"flag"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"

	"farside/internal/dr"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// sampleManifest has one of everything.
func sampleManifest() *manifest {
	return &manifest{
		Machine: dr.MachineID{0xfa, 15: 1}, Current: 1, Next: 4, BaseTimeline: 1,
		Base: 100, BaseTime: 1_000, BaseChain: [32]byte{1}, Horizon: 200, HorizonTime: 2_000, HorizonPoint: true,
		Disks:     []dr.Disk{{ID: 1, Size: 1 << 40, Name: "/dev/sda"}, {ID: 7, Size: 512, Name: "größer ☂"}},
		Timelines: []timelineInfo{{ID: 1}, {ID: 3, Parent: 1, Fork: 250, ForkTime: 2_500}},
		Segments: []segmentInfo{
			{Timeline: 1, Sealed: true, First: 101, Last: 200, FirstTime: 1_001, LastTime: 2_000, Size: 5_000, Chain: [32]byte{2}, EndPoint: true},
			{Timeline: 1, First: 201},
			{Timeline: 3, First: 251},
		},
	}
}

func TestManifestGolden(t *testing.T) {
	b := sampleManifest().encode()
	file := filepath.Join("testdata", "MANIFEST")
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(file, b, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, want) {
		t.Error("the bytes of the format changed: raise the version")
	}
	m, err := decodeManifest(want)
	if err != nil || !bytes.Equal(m.encode(), want) {
		t.Errorf("an old manifest must stay readable: %v", err)
	}
	for i := range want {
		bad := bytes.Clone(want)
		bad[i] ^= 0x20
		if _, err := decodeManifest(bad); err == nil {
			t.Errorf("flip at %d not noticed", i)
		}
		if _, err := decodeManifest(want[:i]); err == nil {
			t.Errorf("truncation to %d not noticed", i)
		}
	}
}

// FuzzManifest: whatever is accepted is written back as the same bytes.
func FuzzManifest(f *testing.F) {
	f.Add(sampleManifest().encode(), false)
	f.Add(sampleManifest().encode(), true)
	f.Fuzz(func(t *testing.T, b []byte, repair bool) {
		if end := len(b) - 4; repair && end > 0 { // get past the checksum
			b = bytes.Clone(b)
			le.PutUint32(b[end:], crc32.Checksum(b[:end], castagnoli))
		}
		m, err := decodeManifest(b)
		if err != nil {
			if !errors.Is(err, dr.ErrCorrupt) && !errors.Is(err, dr.ErrVersion) {
				t.Fatalf("error of no kind: %v", err)
			}
			return
		}
		if !bytes.Equal(m.encode(), b) {
			t.Fatal("accepted bytes that it would not write")
		}
	})
}

// FuzzIndex: keys and values of the index never panic, and what is accepted is
// what would be written.
func FuzzIndex(f *testing.F) {
	k := changeKey{Timeline: 3, Level: 1, Disk: 2, Unit: 77, Seq: 4711, Entry: 5}
	f.Add(k.append(nil), change{Mask: fullMask}.append(nil))
	f.Add(spanKey(1, 9), span{}.value())
	f.Add(tagKey(1, 9), tagValue(dr.Tag{Consistency: dr.Crash, Name: "x"}, 5))
	f.Fuzz(func(t *testing.T, key, value []byte) {
		if k, err := decodeChangeKey(key); err == nil && !bytes.Equal(k.append(nil), key) {
			t.Fatalf("key %x is read as %+v", key, k)
		}
		for _, err := range []error{second(decodeChange(value)), second(decodeSpan(key, value)), second(decodeTag(key, value))} {
			if err != nil && !errors.Is(err, dr.ErrCorrupt) {
				t.Fatalf("error of no kind: %v", err)
			}
		}
	})
}

func second[T any](_ T, err error) error { return err }
