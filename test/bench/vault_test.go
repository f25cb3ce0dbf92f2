package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/nbd"
	"farside/internal/testenv"
	"farside/internal/vault"
	"farside/internal/vfs"
	"farside/internal/view"
)

var vaultMachine = dr.MachineID{1}

// newVault makes a vault with one disk in a directory of the test.
func newVault(t *testing.T, size int64) *vault.Vault {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "vault")
	v, err := vault.Create(vfs.OS(), dir, vaultMachine, []dr.Disk{{ID: 1, Size: size, Name: "disk"}}, vault.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	})
	return v
}

// history appends frames of writes to a vault.
type history struct {
	t    *testing.T
	v    *vault.Vault
	enc  *frame.Encoder
	time int64
}

func newHistory(t *testing.T, v *vault.Vault, codec frame.Codec) *history {
	return &history{t: t, v: v, enc: frame.NewEncoder(v.Log().Cursor(), codec), time: 1e9}
}

// frame makes a frame of n writes that next says.
func (h *history) frame(n int, next func() (off int64, data []byte)) *frame.Frame {
	h.t.Helper()
	h.enc.Begin(frame.Changes, dr.Exact, false)
	for range n {
		off, data := next()
		h.time += 1e5
		if _, err := h.enc.Add(dr.Extent{Disk: 1, Offset: off, Length: int64(len(data))}, dr.Data, h.time, data); err != nil {
			h.t.Fatal(err)
		}
	}
	b, err := h.enc.Finish()
	if err != nil {
		h.t.Fatal(err)
	}
	f, err := frame.Parse(b)
	if err != nil {
		h.t.Fatal(err)
	}
	return f
}

func (h *history) append(f *frame.Frame) {
	h.t.Helper()
	if err := h.v.Log().Append(f); err != nil {
		h.t.Fatal(err)
	}
}

func (h *history) sync() {
	h.t.Helper()
	if _, err := h.v.Log().Sync(); err != nil {
		h.t.Fatal(err)
	}
}

func noise(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := 0; i+8 <= n; i += 8 {
		v := rng.Uint64()
		for j := range 8 {
			b[i+j] = byte(v >> (8 * j))
		}
	}
	return b
}

// TestVaultIngest appends 64 KiB incompressible writes to a vault, as a link
// does: one goroutine appends, one syncs what has gathered. The peer writes the same bytes to a
// file, 4 MiB an fsync.
func TestVaultIngest(t *testing.T) {
	testenv.NeedBench(t)
	const total, frameBytes, group = 512 << 20, 1 << 20, 4
	rng := rand.New(rand.NewPCG(1, 1))
	data := noise(rng, 64<<10)
	var ours, peer []float64
	for range Rounds() {
		v := newVault(t, 1<<30)
		h := newHistory(t, v, frame.None)
		frames := make([]*frame.Frame, 0, total/frameBytes)
		for range cap(frames) {
			frames = append(frames, h.frame(frameBytes/len(data), func() (int64, []byte) { return rng.Int64N(1<<14) << 16, data }))
		}
		ours = append(ours, total/1e6/ingest(h, frames).Seconds())
		peer = append(peer, total/1e6/writeFile(t, frames, group).Seconds())
	}
	o, p := Median(ours), Median(peer)
	Figure{"vault ingest, 64 KiB incompressible, group commit, vs a file with fsync every 4 MiB", o, p, o / p, "MB/s", Rounds()}.Print()
}

func ingest(h *history, frames []*frame.Frame) time.Duration {
	begin := time.Now()
	appended := make(chan struct{}, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		for range appended {
			h.sync()
		}
		h.sync()
	})
	for _, f := range frames {
		h.append(f)
		select {
		case appended <- struct{}{}:
		default:
		}
	}
	close(appended)
	wg.Wait()
	return time.Since(begin)
}

func writeFile(t *testing.T, frames []*frame.Frame, group int) time.Duration {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "plain"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	begin := time.Now()
	for i, x := range frames {
		if _, err := f.Write(x.Bytes()); err != nil {
			t.Fatal(err)
		}
		if i%group == group-1 {
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	return time.Since(begin)
}

// TestViewOpen opens random positions of a disk of 1 TB with ten million writes
// and reads one block of each. The data is all the same, and compressed, to fit on small
// machines; what the index holds does not depend on it.
func TestViewOpen(t *testing.T) {
	testenv.NeedBench(t)
	const size, writes, perFrame = 1 << 40, 10_000_000, 500
	rng := rand.New(rand.NewPCG(2, 2))
	v := newVault(t, size)
	h := newHistory(t, v, frame.Zstd)
	data := noise(rng, 4096)
	begin := time.Now()
	for i := range writes / perFrame {
		h.append(h.frame(perFrame, func() (int64, []byte) { return rng.Int64N(size>>12) << 12, data }))
		if i%4 == 3 {
			h.sync()
		}
	}
	h.sync()
	t.Logf("%d writes in %v", writes, time.Since(begin))
	Figure{Name: "index of 10^7 writes, bytes per write", Ours: float64(v.Stats().IndexBytes) / writes, Unit: "B", Rounds: 1}.Print()
	var opened, read []float64
	buf := make([]byte, 4096)
	for range 200 {
		begin := time.Now()
		w, err := view.Open(v, dr.Position{Timeline: 1, Seq: 1 + dr.Seq(rng.Int64N(writes))})
		if err != nil {
			t.Fatal(err)
		}
		opened = append(opened, time.Since(begin).Seconds()*1e3)
		d, err := w.Disk(1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.ReadAt(buf, rng.Int64N(size>>12)<<12); err != nil {
			t.Fatal(err)
		}
		read = append(read, time.Since(begin).Seconds()*1e3)
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	Figure{"open a position of 1 TB with 10^7 writes, p99", Percentile(opened, 0.99), 0, 0, "ms", 200}.Print()
	Figure{"the same with the first read, p99", Percentile(read, 0.99), 0, 0, "ms", 200}.Print()
	if _, err := v.FoldTo(context.Background(), 0); err != nil {
		t.Fatal(err)
	}
}

// TestViewRead reads 4 KiB at random through a view of a disk of 1 GiB that was
// written twice over, and from a file with the same content; both are in the
// page cache. Compressed blocks are decoded again and again when more of the
// disk is in use than the vault's cache holds ("all") and not otherwise ("64 MiB").
func TestViewRead(t *testing.T) {
	testenv.NeedBench(t)
	const size, reads = 1 << 30, 100_000
	for _, codec := range []frame.Codec{frame.None, frame.Zstd} {
		rng := rand.New(rand.NewPCG(3, 3))
		v := newVault(t, size)
		h := newHistory(t, v, codec)
		data := noise(rng, 64<<10)
		if codec == frame.Zstd {
			clear(data[24<<10:]) // compresses to less than half
		}
		for i := range 2 * size / (1 << 20) {
			left := 1 << 20
			h.append(h.frame(30, func() (int64, []byte) {
				n := min(4096*(1+rng.IntN(16)), left)
				return rng.Int64N((size-65536)>>12) << 12, data[:max(4096, n)]
			}))
			if i%8 == 7 {
				h.sync()
			}
		}
		h.sync()
		w, err := view.Open(v, h.enc.Cursor().Position)
		if err != nil {
			t.Fatal(err)
		}
		d, err := w.Disk(1)
		if err != nil {
			t.Fatal(err)
		}
		f := copyOf(t, d)
		for _, c := range []struct {
			name    string
			part    int64
			workers int
		}{{"all", size, 1}, {"all", size, 4}, {"64 MiB", 64 << 20, 1}, {"64 MiB", 64 << 20, 4}} {
			var ours, peer []float64
			for range Rounds() {
				ours = append(ours, randomReads(t, d.ReadAt, c.part, reads, c.workers))
				peer = append(peer, randomReads(t, f.ReadAt, c.part, reads, c.workers))
			}
			o, p := Median(ours), Median(peer)
			Figure{fmt.Sprintf("view 4k random read of %s, codec %v, %d readers, vs a file", c.name, codec, c.workers), o, p, o / p, "IOPS", Rounds()}.Print()
		}
		viewOverNBD(t, d, f.Name(), codec)
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// viewOverNBD reads a view with history through our server, and a raw file with the same
// content through qemu-nbd.
func viewOverNBD(t *testing.T, d *view.Disk, raw string, codec frame.Codec) {
	testenv.NeedTool(t, "fio", "qemu-nbd")
	t.Run(codec.String(), func(t *testing.T) { // so that both servers end before the view
		dir := t.TempDir()
		servers := []string{serveDevice(t, dir, &nbd.Export{Device: d, ReadOnly: true}), serveQEMU(t, dir, raw)}
		got := make([][]float64, len(servers))
		l := nbdLoad{name: "view over NBD, 4k random read", rw: "randread", bs: "4k", depth: 16, unit: "IOPS"}
		for range Rounds() {
			for i, socket := range servers {
				got[i] = append(got[i], l.run(t, socket))
			}
		}
		o, p := Median(got[0]), Median(got[1])
		Figure{l.name + ", codec " + codec.String() + ", vs qemu-nbd on raw", o, p, o / p, l.unit, Rounds()}.Print()
	})
}

// copyOf writes a disk into a file.
func copyOf(t *testing.T, d *view.Disk) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "copy"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	buf := make([]byte, 1<<20)
	for off := int64(0); off < d.Size(); off += int64(len(buf)) {
		if _, err := d.ReadAt(buf, off); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(buf); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func randomReads(t *testing.T, read func([]byte, int64) (int, error), size int64, n, workers int) float64 {
	t.Helper()
	var wg sync.WaitGroup
	begin := time.Now()
	for i := range workers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 9))
			buf := make([]byte, 4096)
			for range n / workers {
				if _, err := read(buf, rng.Int64N(size>>12)<<12); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return float64(n) / time.Since(begin).Seconds()
}
