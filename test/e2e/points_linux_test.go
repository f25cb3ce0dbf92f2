package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/demo/stage"
	"farside/internal/dr"
	"farside/internal/nbd/nbdtest"
	"farside/internal/segment"
	"farside/internal/testenv"
	"farside/internal/vfs"
	"farside/test/load"
	"farside/test/messages"
)

// TestMain runs the load's process when it is one.
func TestMain(m *testing.M) {
	load.Main()
	messages.Main()
	os.Exit(m.Run())
}

// TestEveryWriteIsAPoint: each file system under a mixed load, 30 random positions through
// the API, NBD, mount, check of the file system, database and oracle; the head against the
// device; the same positions by replaying the stored frames alone; and, as the
// proof that all this would notice, with every 20th change dropped.
func TestEveryWriteIsAPoint(t *testing.T) {
	for fs, size := range map[string]int64{"ext4": 192 << 20, "xfs": 320 << 20, "btrfs": 256 << 20} { // xfs takes no less than 300
		t.Run(fs, func(t *testing.T) {
			t.Parallel()
			everyWriteIsAPoint(t, labOptions{fs: fs, size: size})
		})
	}
}

func everyWriteIsAPoint(t *testing.T, o labOptions) {
	l := newLab(t, o)
	var tag *farsidev1.TagPoint
	l.load(func() {
		time.Sleep(time.Second) // something to copy
		l.protect(l.loop.Device)
		l.exact(90 * time.Second)
		time.Sleep(6 * time.Second)
		tag = l.headEqualsDevice("compared")
		time.Sleep(time.Second)
	})
	if tag == nil {
		return
	}
	l.leave()
	positions := l.positions(rand.New(rand.NewPCG(7, 7)), 30, nil, tag.GetPosition())
	times := l.right(positions)
	t.Logf("%d commits; 30 positions from %v to %v are right", l.oracle.Last(), positions[0], positions[29])
	l.replay(positions, times)
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
		image := filepath.Join(l.scratch(), "replay.img")
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
				work := filepath.Join(filepath.Dir(image), "replayed.img")
				if err := copySparse(image, work); err != nil {
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
	l.t.Logf("negative control: %d of %d positions bad without every 20th change", bad, len(positions)/3)
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

func copySparse(from, to string) error {
	out, err := exec.Command("cp", "--sparse=auto", from, to).CombinedOutput()
	if err != nil {
		return fmt.Errorf("copy %s: %w: %s", from, err, out)
	}
	return nil
}

// TestOverflowAndReturn: a ring that is far too small for the load, so that the
// stream falls back to marking again and again; it becomes exact by itself and
// the head equals the device.
func TestOverflowAndReturn(t *testing.T) {
	l := newLab(t, labOptions{size: 192 << 20, ring: "1MiB"})
	l.load(func() {
		l.protect(l.loop.Device)
		err := stage.Poll(t.Context(), 60*time.Second, "wait for an overflow", func(ctx context.Context) (bool, error) {
			m, err := l.stage.Far.State(ctx)
			return m.GetCounters().GetOverflows() > 1, errors.Join(err, l.stage.Ended())
		})
		if err != nil {
			t.Fatal(err)
		}
	})
	m := l.exact(90 * time.Second)
	l.headEqualsDevice("after overflows")
	t.Logf("%d overflows", m.GetCounters().GetOverflows())
}

// TestJudgesOnAView: what NBD clients of all kinds demand, on the writable view
// of a protected disk's point.
func TestJudgesOnAView(t *testing.T) {
	testenv.NeedTool(t, "nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "fio")
	l := newLab(t, labOptions{size: 64 << 20})
	l.load(func() {
		l.protect(l.loop.Device)
		l.exact(90 * time.Second)
		time.Sleep(time.Second)
	})
	tag := l.headEqualsDevice("judged")
	v := l.open(tag.GetPosition(), true)
	defer l.close(v)
	nbdtest.Judge(t, v.URI, l.size, nbdtest.Options{MinBlock: 512})
	again := l.open(tag.GetPosition(), false) // the judges wrote to the branch, and only there
	defer l.close(again)
	image := filepath.Join(l.scratch(), "again.img")
	l.fetch(again, image)
	if err := l.judge(image, again.View.GetStatus().GetTimeNs()); err != nil {
		t.Errorf("the point after the judges: %v", err)
	}
}
