package capturetest

import (
	"encoding/binary"
	"math/rand/v2"

	"farside/internal/capture"
	"farside/internal/dr"
)

// Workload makes seeded changes on a Kernel: writes of all sizes that stay on their
// way to the disk for a while and land out of order, zeroes, discards, flushes.
// Like a file system it never has two changes of one sector on the way at once.
type Workload struct {
	// Oracle knows what was submitted.
	Oracle *Oracle
	// MaxWrite bounds a change, MaxInFlight how many are on the way at once.
	MaxWrite    int64
	MaxInFlight int

	mem     *Mem
	rng     *rand.Rand
	flying  []*MemWrite
	counter uint64
}

// NewWorkload makes a Workload on m, whose disks may hold anything.
func NewWorkload(m *Mem, seed uint64) *Workload {
	images := make(map[dr.DiskID][]byte)
	for _, d := range m.Disks() {
		images[d.ID] = m.Image(d.ID)
	}
	return &Workload{
		Oracle: NewOracle(images), MaxWrite: 64 << 10, MaxInFlight: 16,
		mem: m, rng: rand.New(rand.NewPCG(seed, 1)),
	}
}

// Step submits a change, flushes or lets a change land.
func (w *Workload) Step() {
	switch n := w.rng.IntN(20); {
	case len(w.flying) >= w.MaxInFlight || n < 8 && len(w.flying) > 0:
		w.land(w.rng.IntN(len(w.flying)))
	case n == 8:
		w.mem.Flush(w.disk().ID)
	default:
		w.submit(n)
	}
}

// LandAll lets everything land that is on the way.
func (w *Workload) LandAll() {
	for len(w.flying) > 0 {
		w.land(w.rng.IntN(len(w.flying)))
	}
}

func (w *Workload) disk() capture.Disk { return w.mem.Disks()[w.rng.IntN(len(w.mem.Disks()))] }

func (w *Workload) land(i int) {
	w.flying[i].Land()
	w.flying = append(w.flying[:i], w.flying[i+1:]...)
}

func (w *Workload) submit(n int) {
	d := w.disk()
	sectors := min(w.MaxWrite, d.Size) / dr.SectorSize
	length := (1 + w.rng.Int64N(1+w.rng.Int64N(sectors))) * dr.SectorSize
	off := w.rng.Int64N((d.Size-length)/dr.SectorSize+1) * dr.SectorSize
	x := dr.Extent{Disk: d.ID, Offset: off, Length: length}
	for i := 0; i < len(w.flying); i++ {
		if f := w.flying[i].Extent(); f.Disk == x.Disk && f.Offset < x.End() && x.Offset < f.End() {
			w.land(i)
			i--
		}
	}
	switch n {
	case 9:
		w.Oracle.Record(x, nil)
		w.flying = append(w.flying, w.mem.SubmitZero(x))
	case 10:
		w.Oracle.Record(x, nil)
		w.flying = append(w.flying, w.mem.SubmitDiscard(x))
	default:
		w.counter++
		data := Pattern(w.counter, length)
		w.Oracle.Record(x, data)
		w.flying = append(w.flying, w.mem.Submit(d.ID, off, data))
	}
}

// Pattern returns n bytes of which every sector, and every started one, tells the
// write and its place in it.
func Pattern(write uint64, n int64) []byte {
	p := make([]byte, (n+dr.SectorSize-1)&^(dr.SectorSize-1))
	for i := 0; i < dr.SectorSize && i < len(p); i++ {
		p[i] = byte(write) + byte(i)
	}
	for off := 0; off < len(p); off += dr.SectorSize {
		copy(p[off:off+dr.SectorSize], p[:dr.SectorSize])
		binary.LittleEndian.PutUint64(p[off:], write)
		binary.LittleEndian.PutUint64(p[off+8:], uint64(off)+1)
	}
	return p[:n]
}
