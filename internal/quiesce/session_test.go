package quiesce

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/dr"
)

// stage is a machine of fake file systems and a fake watchdog, which write down
// what happens to them.
type stage struct {
	mu    sync.Mutex
	log   []string
	vols  []*fakeVolume
	gone  chan struct{}
	deaf  bool // the watchdog does not answer
	limit time.Duration
}

func (s *stage) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, fmt.Sprintf(format, args...))
}

func (s *stage) told() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.log, " ")
}

type fakeVolume struct {
	*stage
	fs     FileSystem
	takes  time.Duration // of a freeze
	fails  error
	syncs  time.Duration
	frozen bool
	thaws  int
}

func (v *fakeVolume) FileSystem() FileSystem { return v.fs }
func (v *fakeVolume) File0() *os.File        { return nil }
func (v *fakeVolume) Sync() error            { time.Sleep(v.syncs); return nil }

func (v *fakeVolume) Freeze() error {
	time.Sleep(v.takes)
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.fails != nil:
		return v.fails
	case v.frozen:
		return errFrozen
	}
	v.frozen = true
	v.log = append(v.log, "+"+v.fs.Mount)
	return nil
}

func (v *fakeVolume) Thaw() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.thaws++
	if !v.frozen {
		return errThawed
	}
	v.frozen = false
	v.log = append(v.log, "-"+v.fs.Mount)
	return nil
}

func (v *fakeVolume) Close() error { v.note("closed"); return nil }

func (s *stage) Arm(d time.Duration) error {
	if s.deaf {
		return fmt.Errorf("it did not answer: %w", dr.ErrUnavailable)
	}
	s.limit = d
	return nil
}

func (s *stage) Freezing(i int) error  { s.note("f%d", i); return nil }
func (s *stage) Thawed(i int)          { s.note("u%d", i) }
func (s *stage) Gone() <-chan struct{} { return s.gone }
func (s *stage) Close() error          { s.note("done"); return nil }

func (s *stage) add(mount string, depth int) *fakeVolume {
	v := &fakeVolume{stage: s, fs: FileSystem{Mount: mount, depth: depth}}
	s.vols = append(s.vols, v)
	return v
}

func (s *stage) prepare(t *testing.T, o Options) (*Session, error) {
	t.Helper()
	s.gone = make(chan struct{})
	var vols []volume
	for _, v := range s.vols {
		vols = append(vols, v)
	}
	return prepare(t.Context(), o, vols, func([]*os.File) (guard, error) { return s, nil })
}

// liquid fails the test if anything is still frozen, or was thawed twice.
func (s *stage) liquid(t *testing.T) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.vols {
		if v.frozen || v.thaws > 1 {
			t.Errorf("%s is frozen: %v, was thawed %d times", v.fs.Mount, v.frozen, v.thaws)
		}
	}
	if !slices.Contains(s.log, "done") {
		t.Error("the watchdog still runs")
	}
}

func TestHoldAndRelease(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var s stage
		s.add("/a", 1)
		s.add("/", 0)
		x, err := s.prepare(t, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if x.Held() == nil {
			t.Error("held before the freeze")
		}
		if err := x.Hold(t.Context(), time.Second); err != nil {
			t.Fatal(err)
		}
		if err := x.Held(); err != nil {
			t.Errorf("not held: %v", err)
		}
		time.Sleep(300 * time.Millisecond)
		r, err := x.Release()
		if err != nil || !slices.Equal(r.Frozen, []string{"/a", "/"}) || r.Duration != 300*time.Millisecond {
			t.Errorf("report %+v, %v", r, err)
		}
		if x.Held() == nil {
			t.Error("held behind the release")
		}
		if got := s.told(); got != "f0 +/a f1 +/ -/ u1 -/a u0 done closed closed" {
			t.Errorf("happened: %s", got)
		}
		if s.limit != time.Second+watchdogMargin {
			t.Errorf("the watchdog was armed for %s", s.limit)
		}
		s.liquid(t)
	})
}

// TestHoldEnds: whatever ends a hold early, everything is thawed at once, Held says so
// and Release tells why.
func TestHoldEnds(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		what func(*stage, *Session)
		want error
	}{
		{"time is up", func(*stage, *Session) { time.Sleep(time.Second) }, ErrTimeout},
		{"the watchdog died", func(s *stage, _ *Session) { close(s.gone); synctest.Wait() }, dr.ErrUnavailable},
		{"somebody thawed", func(s *stage, x *Session) { s.vols[0].frozen = false; _ = x.Held() }, errBroken},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var s stage
				s.add("/a", 0)
				s.add("/b", 0)
				x, err := s.prepare(t, Options{})
				if err != nil {
					t.Fatal(err)
				}
				if err := x.Hold(t.Context(), time.Second); err != nil {
					t.Fatal(err)
				}
				tc.what(&s, x)
				synctest.Wait()
				if err := x.Held(); err == nil {
					t.Error("still held")
				}
				if _, err := x.Release(); !errors.Is(err, tc.want) {
					t.Errorf("Release says %v, want %v", err, tc.want)
				}
				s.liquid(t)
			})
		})
	}
}

// TestFreezeFails: if one file system can't be frozen, none stays frozen.
func TestFreezeFails(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		bad  func(*stage)
		want error
	}{
		{"refused", func(s *stage) { s.vols[1].fails = fmt.Errorf("freeze: %w", os.ErrPermission) }, os.ErrPermission},
		{"frozen by somebody else", func(s *stage) { s.vols[1].fails = errFrozen }, errFrozen},
		{"hangs", func(s *stage) { s.vols[1].takes = time.Minute }, ErrTimeout},
		{"first hangs", func(s *stage) { s.vols[0].takes = 1500 * time.Millisecond }, ErrTimeout},
		{"deaf watchdog", func(s *stage) { s.deaf = true }, dr.ErrUnavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var s stage
				s.add("/a", 1)
				s.add("/b", 0)
				s.add("/c", 0)
				tc.bad(&s)
				x, err := s.prepare(t, Options{})
				if err != nil {
					t.Fatal(err)
				}
				if err := x.Hold(t.Context(), time.Second); !errors.Is(err, tc.want) {
					t.Fatalf("Hold: %v, want %v", err, tc.want)
				}
				if x.Held() == nil {
					t.Error("held after a failure")
				}
				if _, err := x.Release(); tc.name != "deaf watchdog" && !errors.Is(err, tc.want) {
					t.Errorf("Release: %v", err)
				}
				time.Sleep(2 * time.Minute) // until the kernel has answered
				s.liquid(t)
				if tc.name == "deaf watchdog" && strings.Contains(s.told(), "+") {
					t.Errorf("frozen without a watchdog: %s", s.told())
				}
			})
		})
	}
}

func TestHoldIsAborted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var s stage
		s.add("/a", 0).takes = time.Minute
		x, err := s.prepare(t, Options{})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := x.Hold(ctx, time.Hour); !errors.Is(err, ErrTimeout) {
			t.Errorf("Hold: %v", err)
		}
		before := time.Now()
		x.Release() // tested elsewhere
		if d := time.Since(before); d > settleLimit {
			t.Errorf("Release took %s", d)
		}
		time.Sleep(time.Hour)
		s.liquid(t)
		if err := x.Hold(t.Context(), time.Second); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("a second Hold: %v", err)
		}
	})
}

// TestUnable: what the kernel can't freeze is named; if that is all, there is no point.
func TestUnable(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var s stage
		s.add("/boot/efi", 0).fails = dr.ErrUnsupported
		x, err := s.prepare(t, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := x.Hold(t.Context(), time.Second); !errors.Is(err, ErrNothing) {
			t.Errorf("Hold: %v", err)
		}
		x.Release() // nothing to report
		s.add("/", 0)
		if x, err = s.prepare(t, Options{}); err != nil {
			t.Fatal(err)
		}
		if err := x.Hold(t.Context(), time.Second); err != nil {
			t.Fatal(err)
		}
		r, err := x.Release()
		if err != nil || !slices.Equal(r.Frozen, []string{"/"}) || !slices.Equal(r.Unfrozen, []string{"/boot/efi"}) {
			t.Errorf("%+v, %v", r, err)
		}
		s.liquid(t)
	})
}

func TestPrepareFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var none stage
		if _, err := none.prepare(t, Options{}); !errors.Is(err, ErrNothing) {
			t.Errorf("nothing to freeze: %v", err)
		}
		var slow stage
		slow.add("/a", 0).syncs = time.Minute
		if _, err := slow.prepare(t, Options{SyncLimit: time.Second}); !errors.Is(err, ErrTimeout) {
			t.Errorf("endless sync: %v", err)
		}
		time.Sleep(time.Hour)
		slow.liquid(t)
		_, err := prepare(t.Context(), Options{}, []volume{slow.vols[0]}, func([]*os.File) (guard, error) { return nil, dr.ErrUnavailable })
		if !errors.Is(err, dr.ErrUnavailable) {
			t.Errorf("no watchdog: %v", err)
		}
	})
}
