package demo

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farside/internal/dr"
)

func TestOptions(t *testing.T) {
	good := Options{DiskSize: 512 << 20, Duration: 20 * time.Second, Rate: 200, Capture: "auto"}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(o *Options){
		"small disk":    func(o *Options) { o.DiskSize = 1 << 20 },
		"odd disk":      func(o *Options) { o.DiskSize++ },
		"no duration":   func(o *Options) { o.Duration = 0 },
		"negative rate": func(o *Options) { o.Rate = -1 },
		"capture":       func(o *Options) { o.Capture = "magic" },
		"too much":      func(o *Options) { o.Duration = time.Hour },
	} {
		o := good
		spoil(&o)
		if err := o.Check(); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAccount: what counts as lost, given commits that returned at 1, 2, ... 10.
func TestAccount(t *testing.T) {
	o := &oracle{}
	for n := int64(1); n <= 10; n++ {
		o.mu.commits = append(o.mu.commits, commit{N: n, Begin: n - 1, End: n})
	}
	for _, tc := range []struct {
		name                        string
		committed, recovered        int64
		point, durable              int64
		wantLostDurable, wantLostRP int64
	}{
		{"all", 10, 10, 10, 10, 0, 0},
		{"one more that had not returned", 9, 10, 10, 9, 0, 0},
		{"two had not arrived", 10, 8, 8, 8, 0, 2},
		{"one was durable, one was not", 10, 8, 8, 9, 1, 1},
		{"one is missing before the point", 10, 8, 9, 5, 1, 1},
		{"all durable, none there", 10, 0, 10, 10, 10, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := &run{scene: &records{log: o}, durable: tc.durable}
			r.result.Committed = tc.committed
			r.expected.Rows, r.expected.OK = tc.recovered, true
			r.account(tc.point)
			if r.result.LostDurable != tc.wantLostDurable || r.result.LostRPO != tc.wantLostRP {
				t.Errorf("lost %d durable and %d to the RPO, want %d and %d",
					r.result.LostDurable, r.result.LostRPO, tc.wantLostDurable, tc.wantLostRP)
			}
		})
	}
}

func TestResultBad(t *testing.T) {
	good := Result{Recovered: 1, ReplicaEqual: true, Fsck: "clean", Database: "ok", Boot: Boot{Accel: "tcg", Marker: true}}
	if err := good.Bad(); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(r *Result){
		"lost":      func(r *Result) { r.LostDurable = 1 },
		"nothing":   func(r *Result) { r.Recovered = 0 },
		"different": func(r *Result) { r.ReplicaEqual = false },
		"fsck":      func(r *Result) { r.Fsck = "errors" },
		"database":  func(r *Result) { r.Database = "malformed" },
		"boot":      func(r *Result) { r.Boot.Marker = false },
	} {
		r := good
		spoil(&r)
		if r.Bad() == nil {
			t.Errorf("%s is not bad", name)
		}
	}
	skipped := good
	skipped.Boot = Boot{Skipped: "not wanted"}
	if err := skipped.Bad(); err != nil {
		t.Errorf("a guest that was not wanted: %v", err)
	}
}

func TestScreenWithoutATerminal(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := newScreen(f)
	s.title("First")
	for range 10 {
		s.line("now %d", 1)
	}
	b := s.newBar()
	b.set(1<<20, 4<<20)
	b.end(true)
	s.say("done")
	text, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	if got := string(text); strings.Count(got, "now") != 1 || strings.Contains(got, "\r") || !strings.Contains(got, "1. First\n") || !strings.Contains(got, "   done\n") {
		t.Errorf("got %q", got)
	}
}
