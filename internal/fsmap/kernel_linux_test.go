//go:build linux && amd64

package fsmap

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"farside/internal/capture"
	"farside/internal/capture/ebpf"
	"farside/internal/dr"
	"farside/internal/extent"
	"farside/internal/testenv"
	"farside/test/load"
)

// place is a file system on a loop device, with some files and holes between them.
type place struct {
	t     *testing.T
	kind  Kind
	dir   string
	mount string
	loop  *load.Loop
	size  int64
	rng   *rand.Rand

	unmount func() error
}

var sizes = map[Kind]int64{Ext4: 128 << 20, XFS: 304 << 20}

func newPlace(t *testing.T, kind Kind) *place {
	t.Helper()
	testenv.NeedLoop(t)
	testenv.NeedTool(t, "mkfs."+string(kind), "mount", "umount")
	testenv.NeedTool(t, load.Checkers(string(kind))...)
	p := &place{t: t, kind: kind, dir: t.TempDir(), size: sizes[kind], rng: rand.New(rand.NewPCG(1, 2))}
	var err error
	if p.loop, err = load.NewLoop(filepath.Join(p.dir, "disk"), p.size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.loop.Close() })
	if err := p.loop.Format(string(kind)); err != nil {
		t.Fatal(err)
	}
	p.mount = filepath.Join(p.dir, "mnt")
	if p.unmount, err = p.loop.Mount(p.mount); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.unmount(); err != nil {
			t.Error(err)
		}
	})
	for i := range 120 {
		p.write(fmt.Sprintf("old%d", i))
	}
	for i := range 60 {
		p.remove(fmt.Sprintf("old%d", 2*i))
	}
	p.sync()
	return p
}

// write makes a file with random content, durable if the name says so.
func (p *place) write(name string) [sha256.Size]byte {
	b := make([]byte, 1+p.rng.IntN(400<<10))
	for i := 0; i+8 <= len(b); i += 8 {
		ne.PutUint64(b[i:], p.rng.Uint64())
	}
	f, err := os.Create(filepath.Join(p.mount, name))
	if err == nil {
		_, err = f.Write(b)
	}
	if err == nil {
		err = errors.Join(f.Sync(), f.Close())
	}
	if err != nil {
		p.t.Error(err)
	}
	return sha256.Sum256(b)
}

func (p *place) remove(name string) {
	if err := os.Remove(filepath.Join(p.mount, name)); err != nil {
		p.t.Error(err)
	}
}

func (p *place) sync() {
	d, err := os.Open(p.mount)
	if err != nil {
		p.t.Fatal(err)
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		p.t.Fatal(err)
	}
}

// disk reads what is below the page cache of the device: what the file system gave to it.
func (p *place) disk() Disk {
	f, err := os.Open(p.loop.File)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { f.Close() })
	return Disk{Path: p.loop.Device, Size: p.size, ReadAt: f.ReadAt}
}

func (p *place) take(tk *Taker) *Map {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), time.Minute)
	defer cancel()
	m := tk.Take(ctx, p.disk(), p.kind)
	if len(m.Volumes) != 1 || m.Volumes[0].Err != nil || m.Volumes[0].Mount != p.mount || m.Volumes[0].Kind != p.kind {
		p.t.Fatalf("asked: %+v", m.Volumes)
	}
	return m
}

// junk is what a copy holds where nothing was copied.
const junk = 0xA5

// image is a copy of a disk.
type image struct {
	b    []byte
	read int64 // bytes that were copied
}

func newImage(size int64) *image { return &image{b: bytes.Repeat([]byte{junk}, int(size))} }

// copyUsed copies all blocks of 64 KiB but those that are free.
func (im *image) copyUsed(t *testing.T, d Disk, m *Map) {
	t.Helper()
	for off := int64(0); off < d.Size; off += Grain {
		end := min(off+Grain, d.Size)
		if m.Free.Contains(off, end) {
			continue
		}
		if _, err := d.ReadAt(im.b[off:end], off); err != nil {
			t.Fatal(err)
		}
		im.read += end - off
	}
}

// contents recovers an image, as a machine that starts from it would, and returns the checksums
// of its files.
func (p *place) contents(im *image) (map[string][sha256.Size]byte, error) {
	file := filepath.Join(p.dir, "image")
	if err := os.WriteFile(file, im.b, 0o600); err != nil {
		return nil, err
	}
	sums := make(map[string][sha256.Size]byte)
	dir := filepath.Join(p.dir, "copy")
	err := load.WithImage(string(p.kind), file, dir, func() error {
		return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(path)
			sums[strings.TrimPrefix(path, dir+"/")] = sha256.Sum256(b)
			return err
		})
	})
	return sums, err
}

// writers change files until ctx ends, several at a time.
type writers struct {
	wg   sync.WaitGroup
	mu   sync.Mutex
	sums map[string][sha256.Size]byte // of files that are durable
	done map[int]int                  // rounds of each writer
}

func (w *writers) start(p *place, rounds int) {
	w.sums, w.done = make(map[string][sha256.Size]byte), make(map[int]int)
	for n := range 3 {
		own := *p
		own.rng = rand.New(rand.NewPCG(uint64(n), 7))
		w.wg.Go(func() {
			for i := range rounds {
				name := fmt.Sprintf("new%d-%d", n, i)
				sum := own.write(name)
				w.mu.Lock()
				w.sums[name], w.done[n] = sum, i+1
				w.mu.Unlock()
				if i%3 == 2 { // what is removed may come back: it was not synced
					gone := fmt.Sprintf("new%d-%d", n, i-1)
					w.mu.Lock()
					delete(w.sums, gone)
					w.mu.Unlock()
					own.remove(gone)
					own.remove(fmt.Sprintf("old%d", 40*n+2*(i/3)+1))
				}
			}
		})
	}
}

func (w *writers) atLeast(rounds int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for n := range 3 {
		if w.done[n] < rounds {
			return false
		}
	}
	return true
}

// recorder takes the captured writes over.
type recorder struct {
	src    capture.Source
	mu     sync.Mutex
	events []capture.Event
	lost   bool
}

func (r *recorder) run(ctx context.Context) {
	for ctx.Err() == nil {
		_, err := r.src.Next(ctx, 10*time.Millisecond, func(e capture.Event) error {
			r.mu.Lock()
			defer r.mu.Unlock()
			e.Data = bytes.Clone(e.Data)
			r.events = append(r.events, e)
			r.lost = r.lost || e.Kind == capture.Lost
			return nil
		})
		if err != nil {
			return
		}
	}
}

func (r *recorder) apply(im *image) {
	for _, e := range r.events {
		if e.Kind != capture.Change {
			continue
		}
		to := im.b[e.Extent.Offset:e.Extent.End()]
		if clear(to); e.What == dr.Data {
			copy(to, e.Data)
		}
	}
}

// TestCopyOfUsedBlocks: files are written and removed while the map is taken and the used blocks
// are copied. With the captured writes the copy holds every file that a copy of
// all blocks holds, and every durable one; what was free holds junk.
func TestCopyOfUsedBlocks(t *testing.T) {
	t.Parallel()
	for _, kind := range []Kind{Ext4, XFS} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			testenv.NeedEBPF(t)
			p := newPlace(t, kind)
			src, err := ebpf.Open([]capture.Disk{{ID: 1, Path: p.loop.Device}}, ebpf.Options{RingBytes: 64 << 20})
			if err != nil {
				t.Fatal(err)
			}
			defer src.Close()
			ctx, cancel := context.WithCancel(t.Context())
			rec := &recorder{src: src}
			var recording sync.WaitGroup
			recording.Go(func() { rec.run(ctx) })
			defer recording.Wait()
			defer cancel()
			if err := src.Resume(ctx); err != nil {
				t.Fatal(err)
			}
			var w writers
			w.start(p, 40)
			until(t, "the writers have begun", func() bool { return w.atLeast(5) })
			m := p.take(NewTaker())
			used, all := newImage(p.size), newImage(p.size)
			d := p.disk()
			d.ReadAt = func(b []byte, off int64) (int, error) { return src.ReadAt(b, 1, off) }
			used.copyUsed(t, d, m)
			all.copyUsed(t, d, &Map{})
			w.wg.Wait()
			mark := src.Tail()
			until(t, "all is captured", func() bool { return src.Consumed() >= mark })
			cancel()
			recording.Wait()
			if dirty, err := src.Dirty(); rec.lost || dirty != 0 || err != nil {
				t.Fatalf("lost %v, %d bytes dirty, %v", rec.lost, dirty, err)
			}
			rec.apply(used)
			rec.apply(all)
			judgeCopies(t, p, &w, used, all)
			t.Logf("%s of %d MiB: %d MiB are free, %d of %d bytes were read", kind, p.size>>20, m.Free.Bytes()>>20, used.read, all.read)
			if used.read > all.read*3/4 {
				t.Errorf("%d of %d bytes were read", used.read, all.read)
			}
		})
	}
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not in a minute: " + what)
		}
	}
}

func judgeCopies(t *testing.T, p *place, w *writers, used, all *image) {
	t.Helper()
	got, err := p.contents(used)
	if err != nil {
		t.Fatal(err)
	}
	want, err := p.contents(all)
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(got, want) {
		t.Errorf("the copy of the used blocks holds %d files, the whole copy %d; different: %v", len(got), len(want), differences(got, want))
	}
	for name, sum := range w.sums {
		if got[name] != sum {
			t.Errorf("%s is durable, and the copy has another or none", name)
		}
	}
	if len(w.sums) < 60 {
		t.Errorf("only %d files are durable", len(w.sums))
	}
}

func differences(a, b map[string][sha256.Size]byte) (out []string) {
	for n := range b {
		if a[n] != b[n] {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}

// TestMapBeforeTheCapture is a negative control: what is written after the map was taken and before the
// capture began is missing from the copy.
func TestMapBeforeTheCapture(t *testing.T) {
	t.Parallel()
	for _, kind := range []Kind{Ext4, XFS} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			p := newPlace(t, kind)
			m := p.take(NewTaker())
			for i := range 20 {
				p.write(fmt.Sprintf("between%d", i))
			}
			p.sync()
			used, all := newImage(p.size), newImage(p.size)
			used.copyUsed(t, p.disk(), m)
			all.copyUsed(t, p.disk(), &Map{})
			want, err := p.contents(all)
			if err != nil {
				t.Fatal(err)
			}
			got, err := p.contents(used)
			if err == nil && maps.Equal(got, want) {
				t.Error("a map from before the capture does no harm")
			}
			t.Logf("wrong in the copy: %v, %v", err, differences(got, want))
		})
	}
}

// TestUnsynced is a negative control, on xfs: what was freed in memory only is in use yet on
// the disk. A file that was removed is there again in the copy, with something else in it.
func TestUnsynced(t *testing.T) {
	t.Parallel()
	p := newPlace(t, XFS)
	for _, unsynced := range []bool{false, true} {
		wrong := 0
		for try := 0; try < 2 || unsynced && wrong == 0 && try < 6; try++ {
			name := fmt.Sprintf("victim%v%d", unsynced, try)
			sum := p.write(name)
			p.sync()
			tk := NewTaker()
			tk.ask = func(v *volume) ([]extent.Range, error) { v.unsynced = unsynced; return ask(v) }
			p.remove(name)
			time.Sleep(20 * time.Millisecond) // the blocks are freed in the background
			m := p.take(tk)
			used := newImage(p.size)
			used.copyUsed(t, p.disk(), m)
			got, err := p.contents(used)
			if s, there := got[name]; err != nil || there && s != sum {
				wrong++
				t.Logf("without a sync %v: %v, there: %v", unsynced, err, there)
			}
		}
		if (wrong > 0) != unsynced {
			t.Errorf("without a sync %v: %d wrong copies", unsynced, wrong)
		}
	}
}
