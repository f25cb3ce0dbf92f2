package e2e

import (
	"bytes"
	"cmp"
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
	"farside/internal/testenv"
	"farside/test/load"
)

// lab is a loop device with a file system under a mixed load, protected by real roles.
type lab struct {
	t *testing.T
	labOptions
	dir     string
	loop    *load.Loop
	mount   string
	unmount func() error // nil once it was done
	oracle  load.Oracle
	stage   *stage.Stage
}

// labOptions say what a lab is made of. The zero value but for the size is a lab with ext4.
type labOptions struct {
	fs       string                       // ext4 (default), xfs, btrfs
	size     int64                        // of the disk
	ring     string                       // of the capture; "" is the driver's default
	settings map[string]map[string]string // see stage.Options
}

func newLab(t *testing.T, o labOptions) *lab {
	o.fs = cmp.Or(o.fs, "ext4")
	testenv.NeedEBPF(t)
	testenv.NeedLoop(t)
	testenv.NeedTool(t, "mkfs."+o.fs, "mount", "umount")
	testenv.NeedTool(t, load.Checkers(o.fs)...)
	l := &lab{t: t, dir: workDir(t), labOptions: o}
	l.mount = filepath.Join(l.dir, "mnt")
	var err error
	if l.loop, err = load.NewLoop(filepath.Join(l.dir, "disk.img"), o.size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.loop.Close() })
	if err := l.loop.Format(o.fs); err != nil {
		t.Fatal(err)
	}
	if l.unmount, err = l.loop.Mount(l.mount); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.leave)
	l.stage, err = stage.Raise(t.Context(), stage.Options{
		Dir: l.dir, Program: program(t), Driver: "ebpf", Disk: l.loop.Device, Ring: o.ring, Settings: o.settings,
	})
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

// leave unmounts the disk. It must be done before an image of a btrfs is
// mounted, since that has the same identity.
func (l *lab) leave() {
	l.t.Helper()
	if l.unmount == nil {
		return
	}
	if err := l.unmount(); err != nil {
		l.t.Error(err)
	}
	l.unmount = nil
}

// scratch makes a directory for images that are only judged: in memory where that
// is possible, since checks sync a lot.
func (l *lab) scratch() string {
	l.t.Helper()
	parent := "/dev/shm"
	if _, err := os.Stat(parent); err != nil {
		parent = ""
	}
	dir, err := os.MkdirTemp(parent, "farside-e2e-")
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
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
	row, err := load.CheckImage(l.t.Context(), l.fs, image, filepath.Join(l.dir, "check"))
	if err != nil {
		return err
	}
	// The clock of the capture may differ from ours by the length of a read of both.
	if durable := l.oracle.DurableBefore(t - int64(time.Millisecond)); row < durable {
		return fmt.Errorf("row %d is the last, but %d was durable before", row, durable)
	}
	return nil
}
