package export

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"farside/internal/testenv"
)

// disk is a sparse disk in memory: units that it doesn't have read as zeroes.
type disk struct {
	size  int64
	units map[int64][]byte // by unit index
	fail  int64            // offset at which reading fails, or 0

	mu    sync.Mutex
	reads int64
}

func (d *disk) Size() int64 { return d.size }

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	d.reads += int64(len(p))
	d.mu.Unlock()
	if d.fail > 0 && off+int64(len(p)) > d.fail {
		return 0, errors.New("unreadable")
	}
	clear(p)
	for at := off / unit; at*unit < off+int64(len(p)); at++ {
		if u := d.units[at]; u != nil {
			from := max(at*unit, off)
			copy(p[from-off:], u[from-at*unit:])
		}
	}
	return len(p), nil
}

// mappedDisk is a disk with a map whose extents are not aligned to units.
type mappedDisk struct{ *disk }

func (d mappedDisk) Map(off, n int64, fn func(off, n int64, zero, hole bool) error) error {
	for end := off + n; off < end; {
		next := min((off/unit+1)*unit, d.size)
		data := d.units[off/unit] != nil
		if half := off + (next-off)/2; data && half > off && half < next { // in two
			if err := fn(off, half-off, false, false); err != nil {
				return err
			}
			off = half
		}
		if err := fn(off, next-off, !data, !data); err != nil {
			return err
		}
		off = next
	}
	return nil
}

// randomDisk has data in about a third of its units, some of it zeroes.
func randomDisk(seed uint64, size int64) *disk {
	d := &disk{size: size, units: map[int64][]byte{}}
	rng := rand.New(rand.NewPCG(seed, 5))
	fill := rand.NewChaCha8([32]byte{byte(seed)})
	for u := range (size + unit - 1) / unit {
		switch rng.IntN(6) {
		case 0, 1:
			p := make([]byte, min(unit, size-u*unit))
			fill.Read(p)
			d.units[u] = p
		case 2:
			d.units[u] = make([]byte, min(unit, size-u*unit))
		}
	}
	return d
}

func content(t testing.TB, d *disk) []byte {
	p := make([]byte, d.size)
	fail := d.fail
	d.fail = 0
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	d.fail = fail
	return p
}

// memFile is an ImageFile that fails on demand.
type memFile struct {
	b      []byte
	synced int
	fail   func(op string, off int64) error
}

func (f *memFile) try(op string, off int64) error {
	if f.fail == nil {
		return nil
	}
	return f.fail(op, off)
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.try("write", off); err != nil {
		return 0, err
	}
	if end := int(off) + len(p); end > len(f.b) {
		f.b = append(f.b, make([]byte, end-len(f.b))...)
	}
	return copy(f.b[off:], p), nil
}

func (f *memFile) Truncate(size int64) error {
	if err := f.try("truncate", size); err != nil {
		return err
	}
	if int(size) <= len(f.b) {
		f.b = f.b[:size]
	} else {
		f.b = append(f.b, make([]byte, int(size)-len(f.b))...)
	}
	return nil
}

func (f *memFile) Sync() error { f.synced++; return f.try("sync", 0) }

// readQcow2 is the smallest reader that shares nothing with the writer.
func readQcow2(t testing.TB, b []byte) []byte {
	t.Helper()
	be := binary.BigEndian
	if string(b[:4]) != "QFI\xfb" || be.Uint32(b[4:]) != 3 || be.Uint32(b[20:]) != 16 {
		t.Fatalf("header %x", b[:32])
	}
	out := make([]byte, be.Uint64(b[24:]))
	const mask = 1<<56 - 1<<9
	l1 := b[be.Uint64(b[40:]):]
	for i := range int(be.Uint32(b[36:])) {
		l2off := be.Uint64(l1[8*i:]) & mask
		if l2off == 0 {
			continue
		}
		for k := range 8192 {
			if off := be.Uint64(b[int(l2off)+8*k:]) & mask; off != 0 {
				copy(out[(i*8192+k)<<16:], b[off:off+65536])
			}
		}
	}
	return out
}

var sizes = []int64{0, 512, 4096, unit - 512, unit, unit + 512, 3 << 20, 5<<20 + 1024, window + 3*unit + 512}

func TestRaw(t *testing.T) {
	for i, size := range sizes {
		d := randomDisk(uint64(i), size)
		want := content(t, d)
		for _, src := range []Source{d, mappedDisk{d}} {
			f := &memFile{b: []byte("old content")}
			last := int64(-1)
			done, err := WriteRaw(t.Context(), f, src, 0, func(done, total int64) {
				if done < last || done > total || total != size {
					t.Errorf("progress %d after %d of %d", done, last, total)
				}
				last = done
			})
			if err != nil || done != size || last != size || f.synced == 0 {
				t.Errorf("size %d: done %d, progress %d, %v", size, done, last, err)
			}
			if !bytes.Equal(f.b, want) {
				t.Errorf("size %d: image differs", size)
			}
		}
	}
}

func TestQcow2(t *testing.T) {
	for i, size := range sizes {
		d := randomDisk(uint64(i), size)
		want := content(t, d)
		for _, src := range []Source{d, mappedDisk{d}} {
			f := &memFile{b: []byte("old content")}
			if err := WriteQcow2(t.Context(), f, src, nil); err != nil {
				t.Fatal(err)
			}
			if got := readQcow2(t, f.b); !bytes.Equal(got, want) {
				t.Errorf("size %d: image differs", size)
			}
		}
	}
}

// TestHoles: a map spares reading, and zeroes take no space in either image.
func TestHoles(t *testing.T) {
	d := &disk{size: 1 << 30, units: map[int64][]byte{}}
	for _, u := range []int64{0, 8191, 8192, 16383} { // both sides of an L2 table's end
		d.units[u] = bytes.Repeat([]byte{byte(u%7 + 1)}, unit)
	}
	d.units[77] = make([]byte, unit)
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := WriteQcow2(t.Context(), f, mappedDisk{d}, nil); err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	// Header, L1, two L2, four of data, a refcount block and table.
	if info.Size() != 10*unit || d.reads != 5*unit {
		t.Errorf("image of %d clusters, %d units read", info.Size()/unit, d.reads/unit)
	}
	if _, err := WriteRaw(t.Context(), f, mappedDisk{d}, 0, nil); err != nil {
		t.Fatal(err)
	}
	if d.reads != 10*unit {
		t.Errorf("%d units read for the raw image", d.reads/unit)
	}
}

// TestResume breaks the copy everywhere and continues.
func TestResume(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		d := randomDisk(rapid.Uint64Range(0, 99).Draw(rt, "seed"), rapid.Int64Range(1, 200).Draw(rt, "sectors")*32*512)
		want := content(t, d)
		f := &memFile{}
		var from int64
		for rounds := 0; ; rounds++ {
			if d.fail = rapid.Int64Range(0, 2*d.size).Draw(rt, "fail"); rounds > 20 {
				d.fail = 0
			}
			done, err := WriteRaw(t.Context(), f, d, from, nil)
			if done < from {
				rt.Fatalf("went back from %d to %d", from, done)
			}
			if !bytes.Equal(f.b[:done], want[:done]) {
				rt.Fatalf("wrong before %d", done)
			}
			if from = done; err == nil {
				break
			}
		}
		if !bytes.Equal(f.b, want) {
			rt.Fatal("image differs")
		}
	})
}

func TestCancel(t *testing.T) {
	for _, src := range []Source{randomDisk(1, 64<<20), mappedDisk{&disk{size: 1 << 50}}} {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		f := &memFile{}
		if src.Size() > 1<<40 {
			f.fail = func(op string, off int64) error { return nil }
		} else if done, err := WriteRaw(ctx, f, src, 0, nil); !errors.Is(err, context.Canceled) || done == src.Size() {
			t.Errorf("raw: %d, %v", done, err)
		}
		if err := WriteQcow2(ctx, f, src, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("qcow2: %v", err)
		}
		if len(f.b) >= 4 && string(f.b[:4]) == "QFI\xfb" {
			t.Error("a cancelled image looks valid")
		}
	}
}

// TestImageErrors fails each call in turn.
func TestImageErrors(t *testing.T) {
	d := randomDisk(3, 3<<20)
	bad := errors.New("bad")
	for kind, write := range map[string]func(f *memFile) error{
		"raw":   func(f *memFile) error { _, err := WriteRaw(t.Context(), f, d, 0, nil); return err },
		"qcow2": func(f *memFile) error { return WriteQcow2(t.Context(), f, d, nil) },
	} {
		calls := 0
		if err := write(&memFile{fail: func(string, int64) error { calls++; return nil }}); err != nil {
			t.Fatal(err)
		}
		for at := range calls {
			n := 0
			f := &memFile{fail: func(string, int64) error {
				if n++; n == at+1 {
					return bad
				}
				return nil
			}}
			if err := write(f); !errors.Is(err, bad) {
				t.Errorf("%s: call %d failed: %v", kind, at, err)
			}
			if at < calls-1 && kind == "qcow2" && len(f.b) > 4 && string(f.b[:4]) == "QFI\xfb" {
				t.Errorf("a broken image looks valid after call %d of %d", at, calls)
			}
		}
	}
	d.fail = 1 << 20
	if err := WriteQcow2(t.Context(), &memFile{}, d, nil); err == nil {
		t.Error("an unreadable disk was written")
	}
	if _, err := WriteRaw(t.Context(), &memFile{}, badMap{d}, 0, nil); !errors.Is(err, errNoMap) {
		t.Errorf("a bad map: %v", err)
	}
}

var errNoMap = errors.New("no map today")

type badMap struct{ *disk }

func (badMap) Map(int64, int64, func(off, n int64, zero, hole bool) error) error { return errNoMap }

// TestQemuImg lets QEMU judge the images.
func TestQemuImg(t *testing.T) {
	testenv.NeedTool(t, "qemu-img")
	dir := t.TempDir()
	large := &disk{size: 3<<30 + 512, units: map[int64][]byte{0: bytes.Repeat([]byte{1}, unit), 20000: bytes.Repeat([]byte{2}, unit), 3 << 30 / unit: bytes.Repeat([]byte{3}, 512)}}
	many := randomDisk(9, 400<<20)
	for name, d := range map[string]*disk{"tiny": randomDisk(2, 512), "odd": randomDisk(1, 5<<20+1024), "many": many, "large": large} {
		raw, qcow := filepath.Join(dir, name+".raw"), filepath.Join(dir, name+".qcow2")
		for path, write := range map[string]func(f *os.File) error{
			raw:  func(f *os.File) error { _, err := WriteRaw(t.Context(), f, mappedDisk{d}, 0, nil); return err },
			qcow: func(f *os.File) error { return WriteQcow2(t.Context(), f, mappedDisk{d}, nil) },
		} {
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(write(f), f.Close()); err != nil {
				t.Fatal(err)
			}
		}
		run(t, "qemu-img", "check", "-f", "qcow2", qcow)
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, qcow)
		var info struct {
			Size int64 `json:"virtual-size"`
		}
		if err := json.Unmarshal(run(t, "qemu-img", "info", "--output=json", qcow), &info); err != nil || info.Size != d.size {
			t.Errorf("%s: %+v, %v", name, info, err)
		}
	}
}

func run(t *testing.T, tool string, args ...string) []byte {
	t.Helper()
	out, err := exec.Command(tool, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", tool, args, err, out)
	}
	return out
}
