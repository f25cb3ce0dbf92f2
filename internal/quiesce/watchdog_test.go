//go:build linux

package quiesce

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// thawer is what a watchdog under test thaws.
type thawer struct {
	mu     sync.Mutex
	thawed []int
	stuck  int // index that is not frozen yet
}

func (f *thawer) thaw(i int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i == f.stuck {
		return unix.EINVAL
	}
	f.thawed = append(f.thawed, i)
	return nil
}

func (f *thawer) got() []int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(slices.Values(f.thawed))
}

// TestWatchdogRuns: what it thaws, and when, by the orders that it gets.
func TestWatchdogRuns(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		orders []record
		stuck  int
		ends   bool // the agent goes away behind the orders
		want   []int
		after  time.Duration
	}{
		{"told to end", []record{{what: recArm, after: time.Second}, {what: recFreezing, index: 1}, {what: recThawed, index: 1}, {what: recDone}}, -1, false, nil, 0},
		{"agent dies", []record{{what: recArm, after: time.Minute}, {what: recFreezing, index: 0}, {what: recFreezing, index: 2}, {what: recThawed, index: 0}}, -1, true, []int{2}, 0},
		{"time is up", []record{{what: recArm, after: time.Minute}, {what: recFreezing, index: 0}, {what: recFreezing, index: 1}}, -1, false, []int{0, 1}, time.Minute},
		{"armed again", []record{{what: recArm, after: time.Second}, {what: recFreezing, index: 0}, {what: recArm, after: time.Hour}}, -1, false, []int{0}, time.Hour},
		{"one freezes still", []record{{what: recArm, after: time.Second}, {what: recFreezing, index: 0}, {what: recFreezing, index: 1}}, 0, false, []int{0, 1}, time.Second + 5*thawAgain},
		{"no such file system", []record{{what: recFreezing, index: 9}}, -1, true, nil, 0},
		{"nothing", nil, -1, true, nil, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := &thawer{stuck: tc.stuck}
				w := &watchdog{thaw: f.thaw, files: 3, risky: map[int]bool{}}
				orders, done, began := make(chan record), make(chan error, 1), time.Now()
				var answers bytes.Buffer
				go func() { done <- w.run(orders, &answers) }()
				for _, r := range tc.orders {
					orders <- r
				}
				if tc.ends {
					close(orders)
				}
				time.AfterFunc(time.Second+4*thawAgain+thawAgain/2, func() {
					f.mu.Lock()
					defer f.mu.Unlock()
					f.stuck = -1
				})
				if err := <-done; err != nil {
					t.Error(err)
				}
				if got := f.got(); !slices.Equal(got, tc.want) || time.Since(began) != tc.after {
					t.Errorf("thawed %v after %s, want %v after %s", got, time.Since(began), tc.want, tc.after)
				}
				if answers.Bytes()[0] != recReady {
					t.Errorf("answered %q", answers.Bytes())
				}
			})
		})
	}
}

// TestWatchdogHearsNonsense: what is no record is left out.
func TestWatchdogHearsNonsense(t *testing.T) {
	t.Parallel()
	in := slices.Concat([]byte("nonsense"), record{what: recFreezing, index: 1}.bytes(), []byte("cut"))
	orders := make(chan record, 9)
	listen(bytes.NewReader(in), orders)
	var got []record
	for r := range orders {
		got = append(got, r)
	}
	if !slices.Equal(got, []record{{what: recFreezing, index: 1}}) {
		t.Errorf("heard %v", got)
	}
}

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestWatchdogWithoutAgent(t *testing.T) {
	t.Parallel()
	w := &watchdog{files: 1, risky: map[int]bool{}}
	if err := w.run(nil, brokenPipe{}); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("run: %v", err)
	}
	if err := RunWatchdog(); err == nil {
		t.Error("started by a person")
	}
}
