package capturetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// RunMarking checks that the Sources of a driver without data keep the invariants of package
// capture that concern them, and vouch for no state that the disks were not in. A Target's Source must be a
// capture.Verifier that vouches within seconds when nothing is written.
func RunMarking(t *testing.T, f Factory) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Factory)
	}{
		{"Disks", markingDisks},
		{"Dirty", markingDirty},
		{"Wait", markingWait},
		{"Unproven", markingUnproven},
		{"Points", markingPoints},
		{"Close", testClose},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, f) })
	}
}

func markingDisks(t *testing.T, f Factory) {
	src := f(t, Config{Sizes: []int64{8 * mib, 4*mib + 512}}).Source
	disks := src.Disks()
	if len(disks) != 2 || disks[0].ID != 1 || disks[1].ID != 2 || disks[0].Size != 8*mib || disks[1].Size != 4*mib+512 {
		t.Errorf("disks: %+v", disks)
	}
	if s := src.Stats(); s.Mode != capture.ModeBitmap || len(s.Disks) != 2 || s.Disks[1].ID != 2 {
		t.Errorf("stats: %+v", s)
	}
	if err := src.Resume(t.Context()); !errors.Is(err, dr.ErrUnsupported) {
		t.Errorf("resume: %v", err)
	}
	src.Overflow()
	if src.Consumed() < src.Tail() {
		t.Error("something is in the stream")
	}
	p := make([]byte, 1024)
	if n, err := src.ReadAt(p, 2, 4*mib-512); n != len(p) || err != nil {
		t.Errorf("read to the end: %d, %v", n, err)
	}
	if _, err := src.ReadAt(p, 2, 4*mib); err == nil {
		t.Error("read behind the end")
	}
	if _, err := src.ReadAt(p, 7, 0); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("read of an unknown disk: %v", err)
	}
}

func markingDirty(t *testing.T, f Factory) {
	src := f(t, Config{Sizes: []int64{8 * mib}}).Source
	if n, err := src.Dirty(); n != 0 || err != nil {
		t.Fatalf("dirty at first: %d, %v", n, err)
	}
	must(t, src.Mark(dr.Extent{Disk: 1, Offset: mib, Length: 3 * mib}))
	if err := src.Mark(dr.Extent{Disk: 1, Offset: 8 * mib, Length: 512}); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("mark behind the end: %v", err)
	}
	if err := src.Mark(dr.Extent{Disk: 9, Length: 512}); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("mark of an unknown disk: %v", err)
	}
	for sum := int64(0); sum < 3*mib; {
		xs, err := src.TakeDirty(mib)
		must(t, err)
		before := sum
		for _, x := range xs {
			sum += x.Length
		}
		if sum == before || sum-before > mib {
			t.Fatalf("took %d bytes", sum-before)
		}
	}
	if xs, err := src.TakeDirty(mib); len(xs) != 0 || err != nil {
		t.Errorf("took more: %v, %v", xs, err)
	}
}

func markingWait(t *testing.T, f Factory) {
	src := f(t, Config{Sizes: []int64{mib}}).Source
	none := func(e capture.Event) error { return fmt.Errorf("unexpected %v", e.Kind) }
	start := time.Now()
	if n, err := src.Next(t.Context(), 50*time.Millisecond, none); n != 0 || err != nil || time.Since(start) < 40*time.Millisecond {
		t.Errorf("next: %d, %v after %v", n, err, time.Since(start))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := src.Next(ctx, time.Hour, none); !errors.Is(err, context.Canceled) {
		t.Errorf("next with a canceled context: %v", err)
	}
}

// verifier returns the Source as what it must be.
func verifier(t *testing.T, target *Target) capture.Verifier {
	t.Helper()
	v, ok := target.Source.(capture.Verifier)
	if !ok {
		t.Fatalf("%T carries no data and is no Verifier", target.Source)
	}
	return v
}

// markingUnproven: no vouching for what the consumer has not taken.
func markingUnproven(t *testing.T, f Factory) {
	v := verifier(t, f(t, Config{Sizes: []int64{mib}}))
	fol := newFollower(v)
	ask := func(when string) {
		t.Helper()
		if at, err := v.Verify(t.Context()); !errors.Is(err, dr.ErrUnavailable) && !errors.Is(err, dr.ErrNoPoint) {
			t.Errorf("%s: vouches for %v, %v", when, at, err)
		}
	}
	ask("new")
	must(t, v.Mark(dr.Extent{Disk: 1, Length: mib}))
	ask("marked")
	must(t, fol.drain())
	fol.point(t, 10*time.Second)
	must(t, v.Mark(dr.Extent{Disk: 1, Length: 4096}))
	ask("marked again")
	_, err := v.TakeDirty(mib)
	must(t, err)
	ask("taken, not read")
}

// follower keeps a copy of a marking Source's disks.
type follower struct {
	src   capture.Verifier
	image map[dr.DiskID][]byte
}

func newFollower(src capture.Verifier) *follower {
	fol := &follower{src: src, image: make(map[dr.DiskID][]byte)}
	for _, d := range src.Disks() {
		fol.image[d.ID] = make([]byte, d.Size)
	}
	return fol
}

// drain reads what is dirty.
func (fol *follower) drain() error {
	for {
		xs, err := fol.src.TakeDirty(mib)
		if err != nil || len(xs) == 0 {
			return err
		}
		for _, x := range xs {
			if _, err := fol.src.ReadAt(fol.image[x.Disk][x.Offset:x.End()], x.Disk, x.Offset); err != nil {
				return err
			}
		}
	}
}

// point drains until the Source vouches for the copy as of a moment behind the call.
func (fol *follower) point(t *testing.T, limit time.Duration) {
	t.Helper()
	begun := time.Now()
	var err error
	for time.Since(begun) < limit {
		must(t, fol.drain())
		var at time.Time
		if at, err = fol.src.Verify(t.Context()); err == nil && at.After(begun) {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("does not vouch: %v", err)
}

// moment is a state of a disk.
type moment struct {
	begun, ended time.Time // of the write that made it
	image        []byte
}

// markingPoints: a writer writes in bursts; each moment that is vouched for has the content of then.
func markingPoints(t *testing.T, f Factory) {
	target := f(t, Config{Sizes: []int64{mib + 512}})
	v := verifier(t, target)
	fol := newFollower(v)
	must(t, v.Mark(dr.Extent{Disk: 1, Length: mib + 512}))

	var mu sync.Mutex
	history := []moment{{image: make([]byte, mib+512)}}
	stop := make(chan struct{})
	var work sync.WaitGroup
	work.Go(func() {
		rng := rand.New(rand.NewPCG(5, 5))
		for n := uint64(1); ; n++ {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(rng.IntN(3)*rng.IntN(40)) * time.Millisecond):
			}
			image := bytes.Clone(history[len(history)-1].image)
			size := 512 * (1 + rng.IntN(400))
			off := rng.IntN((len(image)-size)/512+1) * 512
			copy(image[off:], Pattern(n, int64(size)))
			mu.Lock() // so that no write is in the history late
			m := moment{begun: time.Now(), image: image}
			if _, err := target.Devices[0].WriteAt(image[off:off+size], int64(off)); err != nil {
				t.Error(err)
			}
			m.ended = time.Now()
			history = append(history, m)
			mu.Unlock()
		}
	})
	seen := make(map[time.Time]bool)
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		must(t, fol.drain())
		at, err := v.Verify(t.Context())
		if err != nil || seen[at] {
			continue
		}
		seen[at] = true
		mu.Lock()
		possible := during(history, at)
		mu.Unlock()
		if !isOne(fol.image[1], possible) {
			t.Errorf("vouches for %v, but the copy is none of %d possible states", at, len(possible))
		}
	}
	close(stop)
	work.Wait()
	fol.point(t, 10*time.Second)
	if !bytes.Equal(fol.image[1], history[len(history)-1].image) {
		t.Error("the copy differs when all is quiet")
	}
	t.Logf("%d points among %d writes", len(seen), len(history)-1)
}

// during returns the states that the disk may have been in at a moment, but for those in the middle of a write.
func during(history []moment, at time.Time) (out [][]byte) {
	for i, m := range history {
		if m.begun.After(at) {
			break
		}
		if i+1 == len(history) || !history[i+1].ended.Before(at) {
			out = append(out, m.image)
		}
	}
	return out
}

func isOne(image []byte, of [][]byte) bool {
	for _, o := range of {
		if bytes.Equal(image, o) {
			return true
		}
	}
	return false
}
