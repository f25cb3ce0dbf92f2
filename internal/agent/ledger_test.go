package agent

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"farside/internal/capture"
	"farside/internal/dr"
	"farside/internal/frame"
)

var ledgerDisks = []capture.Disk{{ID: 3, Size: 300 << 10}, {ID: 9, Size: 1<<20 + 512}}

func cursorAt(seq dr.Seq) frame.Cursor {
	c := frame.Cursor{Machine: dr.MachineID{7}, Position: dr.Position{Timeline: 2, Seq: seq}}
	binary.LittleEndian.PutUint64(c.Chain[:], uint64(seq)*0x9e3779b97f4a7c15)
	return c
}

func newTestLedger(t interface{ Fatal(...any) }, mem []byte) *ledger {
	l, err := openLedger(mem, dr.MachineID{7}, 2, ledgerDisks)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// naive remembers every change with the sequence number of its frame.
type naive struct {
	at []struct {
		x   dr.Extent
		seq dr.Seq
	}
	frames []dr.Seq
}

func covered(rs []dr.Extent, x dr.Extent) bool {
	for _, r := range rs {
		if r.Disk == x.Disk && r.Offset <= x.Offset && r.End() >= x.End() {
			return true
		}
	}
	return false
}

// The ledger never leaves out what changed behind a frame, also after it was cut and
// opened again, and what it names lies within the disks.
func TestLedgerAgainstModel(t *testing.T) {
	mem := make([]byte, ledgerSize(ledgerDisks))
	rapid.Check(t, func(t *rapid.T) {
		clear(mem)
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
		l := newTestLedger(t, mem)
		start := dr.Seq(rng.IntN(1000))
		l.begin(dr.MachineID{7}, ledgerDisks, cursorAt(start), 5)
		m := naive{frames: []dr.Seq{start}}
		seq := start
		for range rapid.IntRange(1, 1200).Draw(t, "frames") {
			for range rng.IntN(3) {
				d := ledgerDisks[rng.IntN(2)]
				first := rng.Int64N(d.Size / dr.SectorSize)
				n := 1 + rng.Int64N(min(20, d.Size/dr.SectorSize-first))
				x := dr.Extent{Disk: d.ID, Offset: first * dr.SectorSize, Length: n * dr.SectorSize}
				l.changed(x)
				m.at = append(m.at, struct {
					x   dr.Extent
					seq dr.Seq
				}{x, seq + 1})
			}
			seq += dr.Seq(1 + rng.IntN(5))
			l.add(cursorAt(seq), uint64(seq)*10, rng.Int64N(genMaxBytes/8))
			m.frames = append(m.frames, seq)
			switch rng.IntN(200) {
			case 0: // the receiver stands at an earlier frame
				i := rng.IntN(len(m.frames))
				n, ok := l.find(cursorAt(m.frames[i]))
				if !ok {
					t.Fatalf("frame %d is not known", m.frames[i])
				}
				if _, known := l.since(m.frames[i]); !known {
					continue
				}
				seq = m.frames[i]
				l.cut(n, seq)
				m.frames = m.frames[:i+1]
				for j := range m.at {
					m.at[j].seq = min(m.at[j].seq, seq+1)
				}
			case 1: // another process
				l = newTestLedger(t, mem)
				if l.fresh {
					t.Fatal("the ledger does not know itself again")
				}
			}
		}
		for range 20 {
			at := m.frames[rng.IntN(len(m.frames))]
			rs, ok := l.since(at)
			if !ok {
				continue
			}
			for _, c := range m.at {
				if c.seq > at && !covered(rs, c.x) {
					t.Fatalf("%v changed in frame %d and is not among what changed since %d", c.x, c.seq, at)
				}
			}
			for _, r := range rs {
				if size := ledgerDisks[map[dr.DiskID]int{3: 0, 9: 1}[r.Disk]].Size; r.Offset < 0 || r.Length <= 0 || r.End() > size {
					t.Fatalf("%v of a disk of %d", r, size)
				}
			}
		}
		if rs, ok := l.since(seq); !ok || len(rs) > len(m.at) {
			t.Fatalf("since the newest frame: %v, %v", rs, ok)
		}
	})
}

func TestLedgerKnowsItsFrames(t *testing.T) {
	mem := make([]byte, ledgerSize(ledgerDisks))
	l := newTestLedger(t, mem)
	if _, ok := l.find(cursorAt(0)); ok || !l.fresh {
		t.Error("a new ledger knows a frame")
	}
	l.begin(dr.MachineID{7}, ledgerDisks, cursorAt(10), 0)
	for seq := dr.Seq(11); seq < ledgerFrames+100; seq++ {
		l.add(cursorAt(seq), uint64(seq), 100)
	}
	if _, ok := l.find(cursorAt(10)); ok {
		t.Error("a frame that was overwritten is known")
	}
	n, ok := l.find(cursorAt(ledgerFrames))
	if _, _, pos, _ := l.entry(n); !ok || pos != ledgerFrames {
		t.Errorf("frame %d at %d, %v", n, pos, ok)
	}
	foreign := cursorAt(ledgerFrames)
	foreign.Chain[0] ^= 1
	if _, ok := l.find(foreign); ok {
		t.Error("a frame of somebody else is known")
	}
	if _, ok := l.find(cursorAt(1 << 40)); ok {
		t.Error("a frame of the future is known")
	}
	if _, ok := l.since(10); ok {
		t.Error("what changed since the beginning is known for ever")
	}
	l.setExact(500)
	if l.exactAt(499) || !l.exactAt(500) || !l.exactAt(501) {
		t.Error("exact marks")
	}
	l.setSyncing()
	if l.exactAt(501) {
		t.Error("exact while syncing")
	}
}

// Memory of anybody else, and memory in which bits fell over, is no ledger; and none of it panics.
func TestLedgerInForeignMemory(t *testing.T) {
	mem := make([]byte, ledgerSize(ledgerDisks))
	l := newTestLedger(t, mem)
	l.begin(dr.MachineID{7}, ledgerDisks, cursorAt(10), 0)
	l.add(cursorAt(20), 7, 100)
	for _, c := range []struct {
		what    string
		machine dr.MachineID
		tl      dr.Timeline
		disks   []capture.Disk
	}{
		{"another machine", dr.MachineID{8}, 2, ledgerDisks},
		{"another timeline", dr.MachineID{7}, 3, ledgerDisks},
		{"fewer disks", dr.MachineID{7}, 2, ledgerDisks[:1]},
		{"a grown disk", dr.MachineID{7}, 2, []capture.Disk{ledgerDisks[0], {ID: 9, Size: 2 << 20}}},
	} {
		copied := append([]byte(nil), mem...)
		if l, err := openLedger(copied, c.machine, c.tl, c.disks); err != nil || !l.fresh {
			t.Errorf("%s: fresh %v, %v", c.what, l.fresh, err)
		}
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		copied := append([]byte(nil), mem[:offFrames+4*frameEntry]...)
		for range 1 + rng.IntN(4) {
			copied[rng.IntN(len(copied))] = byte(rng.Uint32())
		}
		old := append([]byte(nil), mem[:len(copied)]...)
		copy(mem, copied)
		l := newTestLedger(t, mem)
		l.find(cursorAt(20))
		l.since(15)
		l.add(cursorAt(21), 1, 1)
		copy(mem, old)
	}
	for _, off := range []int{offCount, offGen, offExact} { // numbers that no ledger gets to
		was := l.load(off)
		for _, v := range []uint64{1<<64 - 1, 1<<64 - 200, 1 << 63, maxLedgerCount + 1} {
			l.store(off, v)
			if copied := append([]byte(nil), mem...); !newTestLedger(t, copied).fresh {
				t.Errorf("%d at %d makes a sound ledger", v, off)
			}
		}
		l.store(off, was)
	}
	if newTestLedger(t, mem).fresh {
		t.Error("the ledger does not know itself again")
	}
	if _, err := openLedger(make([]byte, 100), dr.MachineID{7}, 2, ledgerDisks); err == nil {
		t.Error("100 bytes are no room for a ledger")
	}
	if _, err := openLedger(mem, dr.MachineID{7}, 2, make([]capture.Disk, maxLedger+1)); err == nil {
		t.Error("too many disks")
	}
}
