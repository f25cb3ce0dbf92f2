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
	"farside/internal/export"
	"farside/test/load"
)

// far is a replicated disk as it is seen on the far side.
type far struct {
	t      *testing.T
	dir    string // of all files
	fs     string
	size   int64 // of the disk
	oracle load.Oracle
	stage  *stage.Stage
	// durable returns the row that must be found at a time; nil: what the oracle says.
	durable func(t int64) int64
	// check judges an image and returns its highest row; nil: load.CheckImage.
	check func(ctx context.Context, image string) (int64, error)
}

// scratch makes a directory for images that are only judged: in memory where that
// is possible, since checks sync a lot.
func (f *far) scratch() string {
	f.t.Helper()
	parent := "/dev/shm"
	if _, err := os.Stat(parent); err != nil {
		parent = ""
	}
	dir, err := os.MkdirTemp(parent, "farside-e2e-")
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// protect begins the replication of a disk by its path; the first copy is made while the
// load goes on.
func (f *far) protect(path string) {
	f.t.Helper()
	x := &f.stage.Far
	if err := errors.Join(x.Offered(f.t.Context(), path), x.Protect(f.t.Context(), path, "ebpf")); err != nil {
		f.t.Fatal(err)
	}
}

// exact waits until every write is a point again. That a role can't be reached
// meanwhile is no error; that one has ended is.
func (f *far) exact(limit time.Duration) *farsidev1.Machine {
	f.t.Helper()
	return f.until(limit, "the stream is exact", func(m *farsidev1.Machine) bool {
		return m.GetState() == farsidev1.MachineState_MACHINE_STATE_PROTECTED && m.GetNewest() != nil
	})
}

// until waits until the machine is as wanted.
func (f *far) until(limit time.Duration, what string, wanted func(*farsidev1.Machine) bool) *farsidev1.Machine {
	f.t.Helper()
	var m *farsidev1.Machine
	var last error
	err := stage.Poll(f.t.Context(), limit, "wait until "+what, func(ctx context.Context) (ok bool, err error) {
		m, last = f.stage.Far.State(ctx)
		return last == nil && wanted(m), f.stage.Ended()
	})
	if err != nil {
		f.t.Fatalf("%v: it is %v: %s: %v; %v; %v", err, m.GetState(), m.GetReason(), last, m.GetProgress(), m.GetEvents())
	}
	return m
}

// equal compares what a device held at some moment between two tags with the views
// of both. A freeze stops writes but not the load's FITRIM, so a block may have been
// discarded in between: each block must be as at the first tag or as at the second.
func (f *far) equal(device []byte, before, after *farsidev1.TagPoint) {
	f.t.Helper()
	first, second := f.read(before.GetPosition()), f.read(after.GetPosition())
	discarded, wrong := 0, 0
	for at := 0; at < len(device); at += 4096 {
		block := device[at : at+4096]
		switch {
		case bytes.Equal(block, first[at:at+4096]):
		case bytes.Equal(block, second[at:at+4096]):
			discarded++
		default:
			if wrong++; wrong < 5 {
				f.t.Errorf("%s: the head differs from the device in block %d of 4 KiB", before.GetName(), at/4096)
			}
		}
	}
	if wrong > 0 {
		f.t.Errorf("%s: %d blocks differ", before.GetName(), wrong)
		return
	}
	f.t.Logf("%s: the head equals the device, %d blocks were discarded while it was read", before.GetName(), discarded)
}

// read returns the whole disk at a position.
func (f *far) read(at *farsidev1.Position) []byte {
	f.t.Helper()
	v := f.open(at, false)
	defer f.close(v)
	b := make([]byte, f.size)
	if _, err := io.ReadFull(io.NewSectionReader(v.Disk, 0, f.size), b); err != nil {
		f.t.Fatal(err)
	}
	return b
}

func (f *far) open(at *farsidev1.Position, writable bool) *stage.Opened {
	f.t.Helper()
	o, err := f.stage.Far.Open(f.t.Context(), &farsidev1.Selector{Point: &farsidev1.Selector_Position{Position: at}}, writable)
	if err != nil {
		f.t.Fatal(err)
	}
	return o
}

func (f *far) close(o *stage.Opened) {
	f.t.Helper()
	if err := f.stage.Far.Close(f.t.Context(), o); err != nil {
		f.t.Error(err)
	}
}

// positions draws n of the positions that are offered behind one (nil: the beginning)
// up to another, in their order. Of an exact span that is any, of an epoch the last.
func (f *far) positions(rng *rand.Rand, n int, since, until *farsidev1.Position) []*farsidev1.Position {
	f.t.Helper()
	r, err := f.stage.Far.Client.ListPoints(f.t.Context(), &farsidev1.ListPointsRequest{Machine: f.stage.Far.Machine})
	if err != nil {
		f.t.Fatal(err)
	}
	var spans []*farsidev1.Span
	total := uint64(0)
	for _, s := range r.GetSpans() {
		s.First.Seq = max(s.First.Seq, since.GetSeq())
		if s.GetAccuracy() != farsidev1.Accuracy_ACCURACY_EXACT {
			s.First.Seq = s.Last.Seq
		}
		s.Last.Seq = min(s.Last.Seq, until.GetSeq())
		if s.GetOpen() || s.First.Seq > s.Last.Seq {
			continue
		}
		spans = append(spans, s)
		total += s.Last.Seq - s.First.Seq + 1
	}
	if total < uint64(n) {
		f.t.Fatalf("only %d positions: %v", total, r.GetSpans())
	}
	var out []*farsidev1.Position
	for range n {
		k := rng.Uint64N(total)
		for _, s := range spans {
			size := s.Last.Seq - s.First.Seq + 1
			if k < size {
				out = append(out, &farsidev1.Position{Timeline: s.First.Timeline, Seq: s.First.Seq + k})
				break
			}
			k -= size
		}
	}
	slices.SortFunc(out, func(a, b *farsidev1.Position) int { return cmp.Compare(a.Seq, b.Seq) })
	return out
}

// right opens positions and judges what is there. It returns the time of each, by
// sequence number.
func (f *far) right(positions []*farsidev1.Position) map[uint64]int64 {
	f.t.Helper()
	times := map[uint64]int64{}
	image := filepath.Join(f.scratch(), "point.img")
	for _, p := range positions {
		v := f.open(p, false)
		status := v.View.GetStatus()
		times[p.GetSeq()] = status.GetTimeNs()
		if got := status.GetPosition(); got.GetSeq() != p.GetSeq() {
			f.t.Errorf("asked for %v, got %v", p, got)
		}
		f.fetch(v, image)
		f.close(v)
		if err := f.judge(image, times[p.GetSeq()]); err != nil {
			f.t.Errorf("position %v: %v", p, err)
		}
	}
	return times
}

// fetch writes a view's disk into a file.
func (f *far) fetch(v *stage.Opened, image string) {
	f.t.Helper()
	file, err := os.Create(image)
	if err != nil {
		f.t.Fatal(err)
	}
	_, err = export.WriteRaw(f.t.Context(), file, v.Disk, 0, nil)
	if err := errors.Join(err, file.Close()); err != nil {
		f.t.Fatal(err)
	}
}

// judge mounts an image as an administrator would and holds it against the
// oracle for a time.
func (f *far) judge(image string, t int64) error {
	ctx, cancel := context.WithTimeout(f.t.Context(), time.Minute)
	defer cancel()
	check := f.check
	if check == nil {
		check = func(ctx context.Context, image string) (int64, error) {
			return load.CheckImage(ctx, f.fs, image, filepath.Join(f.dir, "check"))
		}
	}
	row, err := check(ctx, image)
	if err != nil {
		return err
	}
	// The clock of the capture may differ from ours by the length of a read of both.
	durable := f.oracle.DurableBefore(t - int64(time.Millisecond))
	if f.durable != nil {
		durable = f.durable(t)
	}
	if row < durable {
		return fmt.Errorf("row %d is the last, but %d was durable before", row, durable)
	}
	return nil
}
