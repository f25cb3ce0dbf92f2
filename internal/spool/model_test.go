package spool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

// world is a spool next to what it must hold.
type world struct {
	t    *rapid.T
	mem  *vfs.Mem
	fail bool // calls that change something fail
	s    *Spool
	opts Options

	frames []*frame.Frame // of the history since the last reset, as far as it was ever made
	begin  frame.Cursor   // where that history begins
	have   int            // frames in the spool
	synced int            // of them, promised
	gone   int            // of them, given up by Trim
	resets int
	made   int64 // frames ever: no two are alike

	far   int             // frames that the far side has
	disk  map[int64]int64 // what they made of its disk: the newest frame by offset
	folds int
}

// hot is how many places the frames write to.
const hot = 6

func (w *world) open() {
	fsys := vfs.NewFault(w.mem, func(op vfs.Op) error {
		if w.fail && op.Kind.Changes() {
			return syscall.EIO
		}
		return nil
	})
	s, err := Open(fsys, "/spool/m", w.opts)
	if err != nil {
		w.t.Fatal(err)
	}
	w.s = s
	w.learn()
}

// learn takes over what the spool has after a failure or a crash, and checks it.
func (w *world) learn() {
	c, ok := w.s.Cursor()
	if !ok {
		w.t.Fatal("the spool has forgotten where it stands")
	}
	for w.have = 0; w.have < len(w.frames) && w.cursor(w.have) != c; w.have++ {
	}
	if w.cursor(w.have) != c {
		w.t.Fatalf("the spool stands at %v, nobody ever was there", c.Position)
	}
	if w.have < w.synced {
		w.t.Fatalf("%d frames are left of %d synced", w.have, w.synced)
	}
}

// cursor is the one after n frames.
func (w *world) cursor(n int) frame.Cursor {
	if n == 0 {
		return w.begin
	}
	return w.frames[n-1].End()
}

func (w *world) append(n int) {
	// Another history from here on, as an agent that starts anew makes it.
	w.frames = w.frames[:w.have:w.have]
	e := frame.NewEncoder(w.cursor(w.have), frame.None)
	var more []*frame.Frame
	for range n {
		w.made++
		e.Begin(frame.Changes, dr.Exact, false)
		must(e.Add(dr.Extent{Offset: w.made % hot * 512, Length: 512}, dr.Data, w.made, binary.BigEndian.AppendUint64(make([]byte, 504), uint64(w.made))))
		more = append(more, must(frame.Parse(must(e.Finish()))))
		if w.made%17 == 0 {
			more = append(more, must(frame.Parse(must(e.Tag(dr.Tag{Consistency: dr.Crash}, w.made, false)))))
		}
	}
	n = len(more)
	err := w.s.Append(context.Background(), more)
	w.frames = append(w.frames, more...)
	if err != nil {
		w.recover()
		return
	}
	w.have += n
	for w.synced < w.have && w.s.Synced().Position.Seq > w.cursor(w.synced).Position.Seq {
		w.synced++ // by a step to another segment
	}
}

func (w *world) sync() {
	if w.s.Sync() != nil {
		w.recover()
		return
	}
	w.learn() // a Sync may have healed
	w.synced = w.have
	if got := w.s.Synced(); got != w.cursor(w.synced) {
		w.t.Fatalf("synced at %v, not at %v", got.Position, w.cursor(w.synced).Position)
	}
}

// recover does what a link does after an error, when the disk works again.
func (w *world) recover() {
	w.fail = false
	if err := w.s.Sync(); err != nil {
		w.t.Fatalf("it does not heal: %v", err)
	}
	w.learn()
	w.synced = w.have
}

func (w *world) trim(n int) {
	n = min(n, w.far)
	_ = w.s.Trim(w.cursor(n).Position.Seq) // it may fail and is tried again
	w.gone = max(w.gone, n)
}

// read is the far side that connects and takes some frames.
func (w *world) read(most int) {
	r, err := w.s.ReadFrom(w.cursor(w.far))
	if err != nil {
		w.t.Fatal(err)
	}
	for ; w.far < w.synced && most > 0; most-- {
		f, err := r.Next(context.Background())
		if err != nil {
			w.t.Fatalf("frame behind %d of %d: %v", w.far, w.synced, err)
		}
		w.take(f)
	}
	if w.far == w.synced && r.Ready() {
		w.t.Fatal("more is shown than was synced")
	}
	if w.gone > 0 {
		if _, err := w.s.ReadFrom(w.begin); err != nil && !errors.Is(err, dr.ErrGap) {
			w.t.Fatal(err)
		}
	}
}

// take applies a frame at the far side and compares its disk with what the
// originals make, if that is a point. A tag is one always.
func (w *world) take(f *frame.Frame) {
	if err := f.Check(w.cursor(w.far)); err != nil {
		w.t.Fatal(err)
	}
	raw := must(f.Payload(nil))
	for _, x := range f.All() {
		w.disk[x.Offset] = int64(binary.BigEndian.Uint64(raw[x.RawOff+504:]))
	}
	from := w.far
	for w.far++; w.far <= w.synced && w.cursor(w.far) != f.End(); w.far++ {
	}
	if w.far > w.synced {
		w.t.Fatalf("a frame ends at %v, where none did", f.Last)
	}
	if f.Open {
		return
	}
	want := map[int64]int64{}
	for i, o := range w.frames[:w.far] {
		for _, x := range o.All() {
			want[x.Offset] = int64(binary.BigEndian.Uint64(must(o.Payload(nil))[504:]))
		}
		if o.Kind == frame.TagKind && i >= from && w.far > from+1 {
			w.t.Fatal("a tag was folded away")
		}
	}
	if !maps.Equal(want, w.disk) {
		w.t.Fatalf("after frame %d the far side has %v, not %v", w.far, w.disk, want)
	}
}

func (w *world) fold(limit int64) {
	w.read(0) // it connects
	done, err := w.s.Fold(context.Background(), FoldOptions{MaxBytes: limit})
	if err != nil {
		w.recover()
		return
	}
	for w.synced < w.have && w.s.Synced().Position.Seq > w.cursor(w.synced).Position.Seq {
		w.synced++ // by the fresh segment
	}
	if done.Frames > 0 {
		w.folds++
	}
}

func (w *world) reset() {
	w.resets++
	w.begin = origin
	w.begin.Position.Seq += dr.Seq(1000 * w.resets)
	w.begin.Chain[0] = byte(w.resets)
	if err := w.s.Reset(w.begin); err != nil {
		w.fail = false
		if err := w.s.Reset(w.begin); err != nil {
			w.t.Fatalf("it can't be reset: %v", err)
		}
	}
	w.frames, w.have, w.synced, w.gone, w.far, w.disk = nil, 0, 0, 0, 0, map[int64]int64{}
}

func (w *world) restart(crash bool, seed uint64) {
	w.fail = false
	if crash {
		w.mem = w.mem.Crash(seed)
	} else if err := w.s.Close(); err != nil {
		w.t.Fatal(err)
	}
	w.open()
	w.synced = w.have
}

// Any history of appends, syncs, folds, trims, resets, failing disks, restarts and power
// cuts: what was synced and not trimmed is there, in order, and nothing else is shown.
func TestModel(t *testing.T) {
	folds := 0
	rapid.Check(t, func(rt *rapid.T) {
		w := &world{t: rt, mem: vfs.NewMem(), begin: origin, disk: map[int64]int64{}}
		w.opts = Options{SegmentSize: rapid.SampledFrom([]int64{1000, 2500, 1 << 20}).Draw(rt, "segment")}
		must(0, errors.Join(w.mem.MkdirAll("/spool"), w.mem.SyncDir("/")))
		s := must(Open(w.mem, "/spool/m", w.opts))
		must(0, errors.Join(s.Reset(origin), s.Close()))
		w.open()
		for range rapid.IntRange(1, 40).Draw(rt, "steps") {
			switch call := rapid.IntRange(0, 13).Draw(rt, "call"); call {
			case 0, 1, 2, 3:
				w.append(rapid.IntRange(1, 6).Draw(rt, "frames"))
			case 4, 5:
				w.sync()
			case 6:
				w.trim(rapid.IntRange(0, 40).Draw(rt, "trimmed"))
			case 7:
				w.read(rapid.IntRange(0, 9).Draw(rt, "read"))
			case 12, 13:
				w.fold(rapid.SampledFrom([]int64{3000, 1 << 20}).Draw(rt, "run"))
			case 8:
				w.fail = true
			case 9, 10:
				w.restart(call == 9, rapid.Uint64().Draw(rt, "seed"))
			case 11:
				if rapid.IntRange(0, 3).Draw(rt, "reset") == 0 {
					w.reset()
				}
			}
			if st := w.s.Status(); st.Backlog > st.Bytes || st.Durable > w.cursor(w.have).Position.Seq {
				rt.Fatalf("status %+v", st)
			}
		}
		w.recover()
		w.read(1 << 30)
		must(0, w.s.Close())
		folds += w.folds
	})
	if folds == 0 {
		t.Error("no fold was of any use")
	}
}

// BenchmarkAppend is frames into a spool on the disk, synced every 8 MiB.
func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{64 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			s := must(Open(vfs.OS(), b.TempDir()+"/m", Options{}))
			defer s.Close()
			must(0, s.Reset(origin))
			e := frame.NewEncoder(origin, frame.None)
			data := make([]byte, size)
			b.SetBytes(8 << 20)
			for b.Loop() {
				b.StopTimer()
				var group []*frame.Frame
				for range 8 << 20 / size {
					e.Begin(frame.Changes, dr.Exact, false)
					must(e.Add(dr.Extent{Length: int64(size)}, dr.Data, 0, data))
					group = append(group, must(frame.Parse(must(e.Finish()))))
				}
				b.StartTimer()
				must(0, errors.Join(s.Append(b.Context(), group), s.Sync(), s.Trim(group[0].Last-1)))
			}
		})
	}
}
