package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/demo/stage"
	"farside/internal/dr"
	"farside/internal/export"
	"farside/internal/nbd/nbdtest"
	"farside/internal/segment"
	"farside/internal/testenv"
	"farside/internal/vfs"
	"farside/test/load"
)

// TestMain runs the load's process when it is one.
func TestMain(m *testing.M) {
	load.Main()
	os.Exit(m.Run())
}

// lab is a loop device with ext4 under a mixed load, protected by real roles.
type lab struct {
	t      *testing.T
	dir    string
	loop   *load.Loop
	mount  string
	oracle load.Oracle
	stage  *stage.Stage
	size   int64
}

func newLab(t *testing.T, size int64, ring string) *lab {
	testenv.NeedEBPF(t)
	testenv.NeedLoop(t)
	testenv.NeedTool(t, "mkfs.ext4", "e2fsck", "mount", "umount")
	l := &lab{t: t, dir: workDir(t), size: size}
	l.mount = filepath.Join(l.dir, "mnt")
	var err error
	if l.loop, err = load.NewLoop(filepath.Join(l.dir, "disk.img"), size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.loop.Close() })
	if err := l.loop.Format("ext4"); err != nil {
		t.Fatal(err)
	}
	unmount, err := l.loop.Mount(l.mount)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmount(); err != nil {
			t.Error(err)
		}
	})
	l.stage, err = stage.Raise(t.Context(), stage.Options{Dir: l.dir, Program: program(t), Driver: "ebpf", Disk: l.loop.Device, Ring: ring})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.stage.Strike(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			for _, role := range []string{"agent", "process-server", "master-target", "config-server"} {
				t.Logf("%s: %s", role, stage.LastLines(filepath.Join(l.dir, role+".log"), 15))
			}
		}
	})
	return l
}

// protect begins the replication; the first copy is made while the load goes on.
func (l *lab) protect() {
	l.t.Helper()
	f := &l.stage.Far
	if err := errors.Join(f.Offered(l.t.Context(), l.loop.Device), f.Protect(l.t.Context(), l.loop.Device, "ebpf")); err != nil {
		l.t.Fatal(err)
	}
}

// exact waits until every write is a point again.
func (l *lab) exact() *farsidev1.Machine {
	l.t.Helper()
	var m *farsidev1.Machine
	err := stage.Poll(l.t.Context(), 90*time.Second, "wait until the stream is exact", func(ctx context.Context) (ok bool, err error) {
		m, err = l.stage.Far.State(ctx)
		return m.GetState() == farsidev1.MachineState_MACHINE_STATE_PROTECTED && m.GetNewest() != nil, errors.Join(err, l.stage.Ended())
	})
	if err != nil {
		l.t.Fatal(err)
	}
	return m
}

// load runs the mixed load while fn runs.
func (l *lab) load(fn func()) {
	l.t.Helper()
	stop, err := load.Start(l.mount, &l.oracle)
	if err != nil {
		l.t.Fatal(err)
	}
	defer func() {
		if err := stop(); err != nil {
			l.t.Error(err)
		}
	}()
	fn()
}

// headEqualsDevice freezes the file system, tags, reads the device, tags again,
// and compares the views of both tags with what was read. A freeze stops writes but
// not the load's FITRIM, so a block may have been discarded in between: each block
// must be as at the first tag or as at the second.
func (l *lab) headEqualsDevice(name string) *farsidev1.TagPoint {
	l.t.Helper()
	ctx := l.t.Context()
	thaw, err := load.Freeze(l.mount)
	if err != nil {
		l.t.Fatal(err)
	}
	before, err1 := l.stage.Far.Tag(ctx, name)
	device, err2 := os.ReadFile(filepath.Join(l.dir, "disk.img"))
	after, err3 := l.stage.Far.Tag(ctx, name+", read")
	if err := errors.Join(err1, err2, err3, thaw()); err != nil {
		l.t.Fatal(err)
	}
	first, second := l.read(before.GetPosition()), l.read(after.GetPosition())
	discarded := 0
	for at := 0; at < len(device); at += 4096 {
		block := device[at : at+4096]
		switch {
		case bytes.Equal(block, first[at:at+4096]):
		case bytes.Equal(block, second[at:at+4096]):
			discarded++
		default:
			l.t.Errorf("%s: the head differs from the device in block %d of 4 KiB", name, at/4096)
			return before
		}
	}
	l.t.Logf("%s: the head equals the device, %d blocks were discarded while it was read", name, discarded)
	return before
}

// read returns the whole disk at a position.
func (l *lab) read(at *farsidev1.Position) []byte {
	l.t.Helper()
	v := l.open(at, false)
	defer l.close(v)
	b := make([]byte, l.size)
	if _, err := io.ReadFull(io.NewSectionReader(v.Disk, 0, l.size), b); err != nil {
		l.t.Fatal(err)
	}
	return b
}

func (l *lab) open(at *farsidev1.Position, writable bool) *stage.Opened {
	l.t.Helper()
	o, err := l.stage.Far.Open(l.t.Context(), &farsidev1.Selector{Point: &farsidev1.Selector_Position{Position: at}}, writable)
	if err != nil {
		l.t.Fatal(err)
	}
	return o
}

func (l *lab) close(o *stage.Opened) {
	l.t.Helper()
	if err := l.stage.Far.Close(l.t.Context(), o); err != nil {
		l.t.Error(err)
	}
}

// exactPositions draws n positions of the exact history up to a tag.
func (l *lab) exactPositions(n int, until *farsidev1.Position) []*farsidev1.Position {
	l.t.Helper()
	r, err := l.stage.Far.Client.ListPoints(l.t.Context(), &farsidev1.ListPointsRequest{Machine: l.stage.Far.Machine})
	if err != nil {
		l.t.Fatal(err)
	}
	var spans []*farsidev1.Span
	total := uint64(0)
	for _, s := range r.GetSpans() {
		if s.GetAccuracy() == farsidev1.Accuracy_ACCURACY_EXACT && !s.GetOpen() && s.GetFirst().GetSeq() < until.GetSeq() {
			s.Last.Seq = min(s.Last.Seq, until.GetSeq())
			spans = append(spans, s)
			total += s.Last.Seq - s.First.Seq + 1
		}
	}
	if total < 1000 {
		l.t.Fatalf("only %d exact positions: %v", total, r.GetSpans())
	}
	rng := rand.New(rand.NewPCG(7, 7))
	var out []*farsidev1.Position
	for range n {
		k := rng.Uint64N(total)
		for _, s := range spans {
			if size := s.Last.Seq - s.First.Seq + 1; k < size {
				out = append(out, &farsidev1.Position{Timeline: s.First.Timeline, Seq: s.First.Seq + k})
				break
			} else {
				k -= size
			}
		}
	}
	slices.SortFunc(out, func(a, b *farsidev1.Position) int { return int(int64(a.Seq) - int64(b.Seq)) })
	return out
}

// judge mounts an image as an administrator would and holds it against the
// oracle for a time.
func (l *lab) judge(image string, t int64) error {
	row, err := load.CheckImage(l.t.Context(), image, filepath.Join(l.dir, "check"))
	if err != nil {
		return err
	}
	// The clock of the capture may differ from ours by the length of a read of both.
	if durable := l.oracle.DurableBefore(t - int64(time.Millisecond)); row < durable {
		return fmt.Errorf("row %d is the last, but %d was durable before", row, durable)
	}
	return nil
}

// TestEveryWriteIsAPoint: ext4 under a mixed load, 30 random positions through
// the API, NBD, mount, e2fsck, database and oracle; the head against the
// device; the same positions by replaying the stored frames alone; and, as the
// proof that all this would notice, with every 20th change dropped.
func TestEveryWriteIsAPoint(t *testing.T) {
	l := newLab(t, 192<<20, "")
	var tag *farsidev1.TagPoint
	l.load(func() {
		time.Sleep(time.Second) // something to copy
		l.protect()
		l.exact()
		time.Sleep(6 * time.Second)
		tag = l.headEqualsDevice("compared")
		time.Sleep(time.Second)
	})
	if tag == nil {
		return
	}
	positions := l.exactPositions(30, tag.GetPosition())
	times := map[uint64]int64{}
	image := filepath.Join(l.dir, "point.img")
	for _, p := range positions {
		v := l.open(p, false)
		status := v.View.GetStatus()
		times[p.GetSeq()] = status.GetTimeNs()
		if got := status.GetPosition(); got.GetSeq() != p.GetSeq() {
			t.Errorf("asked for %v, got %v", p, got)
		}
		l.fetch(v, image)
		l.close(v)
		if err := l.judge(image, times[p.GetSeq()]); err != nil {
			t.Errorf("position %v: %v", p, err)
		}
	}
	t.Logf("%d commits; 30 positions from %v to %v are right", l.oracle.Last(), positions[0], positions[29])
	l.replay(positions, times)
}

func (l *lab) fetch(v *stage.Opened, image string) {
	l.t.Helper()
	f, err := os.Create(image)
	if err != nil {
		l.t.Fatal(err)
	}
	_, err = export.WriteRaw(l.t.Context(), f, v.Disk, 0, nil)
	if err := errors.Join(err, f.Close()); err != nil {
		l.t.Fatal(err)
	}
}

// replay applies the frames in the vault's segments to images, without vault or
// view: once whole, and once without every 20th change of the exact history.
func (l *lab) replay(positions []*farsidev1.Position, times map[uint64]int64) {
	l.t.Helper()
	names, err := filepath.Glob(filepath.Join(l.dir, "master-target", "vaults", "*", "log", "*.seg"))
	if err != nil || len(names) == 0 {
		l.t.Fatalf("no segments: %v", err)
	}
	slices.Sort(names)
	bad := 0
	for _, drop := range []bool{false, true} {
		image := filepath.Join(l.dir, "replay.img")
		f, err := os.Create(image)
		if err != nil {
			l.t.Fatal(err)
		}
		if err := f.Truncate(l.size); err != nil {
			l.t.Fatal(err)
		}
		next := 0
		apply := func(at dr.Seq) {
			for next < len(positions) && dr.Seq(positions[next].GetSeq()) <= at {
				p := positions[next].GetSeq()
				next++
				if next%3 != 0 { // ten of them do
					continue
				}
				work := filepath.Join(l.dir, "replayed.img")
				if err := copyFile(image, work); err != nil {
					l.t.Fatal(err)
				}
				switch err := l.judge(work, times[p]); {
				case err != nil && !drop:
					l.t.Errorf("replayed up to %d: %v", p, err)
				case err != nil:
					bad++
				}
			}
		}
		for _, name := range names {
			l.replaySegment(name, f, drop, dr.Seq(positions[0].GetSeq()), apply)
		}
		f.Close()
	}
	if bad == 0 {
		l.t.Error("with every 20th change dropped, no position was found to be bad: the judgement has no power")
	}
	l.t.Logf("negative control: %d of 10 positions bad without every 20th change", bad)
}

func (l *lab) replaySegment(name string, image io.WriterAt, drop bool, exactFrom dr.Seq, apply func(dr.Seq)) {
	l.t.Helper()
	r, err := segment.Open(vfs.OS(), filepath.Dir(name), filepath.Base(name))
	if err != nil {
		l.t.Fatal(err)
	}
	defer r.Close()
	for _, e := range r.Entries() {
		f, err := r.Frame(e.Off)
		if err != nil {
			l.t.Fatal(err)
		}
		raw, err := f.Payload(nil)
		if err != nil {
			l.t.Fatal(err)
		}
		for _, x := range f.All() {
			apply(x.Seq - 1)
			if drop && x.Seq >= exactFrom/2 && x.Seq%20 == 0 && !e.Open {
				continue
			}
			data := make([]byte, x.Length)
			if x.What == dr.Data {
				data = raw[x.RawOff:][:x.Length]
			}
			if _, err := image.WriteAt(data, x.Offset); err != nil {
				l.t.Fatal(err)
			}
		}
		apply(f.Last)
	}
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o600)
}

// TestOverflowAndReturn: a ring that is far too small for the load, so that the
// stream falls back to marking again and again; it becomes exact by itself and
// the head equals the device.
func TestOverflowAndReturn(t *testing.T) {
	l := newLab(t, 192<<20, "1MiB")
	l.load(func() {
		l.protect()
		err := stage.Poll(t.Context(), 60*time.Second, "wait for an overflow", func(ctx context.Context) (bool, error) {
			m, err := l.stage.Far.State(ctx)
			return m.GetCounters().GetOverflows() > 1, errors.Join(err, l.stage.Ended())
		})
		if err != nil {
			t.Fatal(err)
		}
	})
	m := l.exact()
	l.headEqualsDevice("after overflows")
	t.Logf("%d overflows", m.GetCounters().GetOverflows())
}

// TestJudgesOnAView: what NBD clients of all kinds demand, on the writable view
// of a protected disk's point.
func TestJudgesOnAView(t *testing.T) {
	testenv.NeedTool(t, "nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "fio")
	l := newLab(t, 64<<20, "")
	l.load(func() {
		l.protect()
		l.exact()
		time.Sleep(time.Second)
	})
	tag := l.headEqualsDevice("judged")
	v := l.open(tag.GetPosition(), true)
	defer l.close(v)
	nbdtest.Judge(t, v.URI, l.size, nbdtest.Options{MinBlock: 512})
	again := l.open(tag.GetPosition(), false) // the judges wrote to the branch, and only there
	defer l.close(again)
	image := filepath.Join(l.dir, "again.img")
	l.fetch(again, image)
	if err := l.judge(image, again.View.GetStatus().GetTimeNs()); err != nil {
		t.Errorf("the point after the judges: %v", err)
	}
}
