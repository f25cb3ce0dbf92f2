package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// recorder stands for a test and remembers how it would have ended.
type recorder struct {
	testing.TB
	skipped, failed bool
}

// done is the panic that stops a recorded test.
type done struct{}

func (r *recorder) Helper() {}

func (r *recorder) Skipf(string, ...any) { r.skipped = true; panic(done{}) }

func (r *recorder) Fatalf(string, ...any) { r.failed = true; panic(done{}) }

func record(t *testing.T, need func(testing.TB)) (r *recorder) {
	t.Helper()
	r = &recorder{TB: t}
	defer func() {
		if p := recover(); p != nil && p != (done{}) {
			panic(p)
		}
	}()
	need(r)
	return r
}

func noSuchTool(t testing.TB) { NeedTool(t, "farside-no-such-tool") }

func TestMissingSkips(t *testing.T) {
	t.Setenv("FARSIDE_REQUIRE", "")
	if r := record(t, noSuchTool); !r.skipped || r.failed {
		t.Errorf("skipped %v, failed %v", r.skipped, r.failed)
	}
}

func TestMissingFailsWhereAllIsRequired(t *testing.T) {
	t.Setenv("FARSIDE_REQUIRE", "all")
	if r := record(t, noSuchTool); r.skipped || !r.failed {
		t.Errorf("skipped %v, failed %v", r.skipped, r.failed)
	}
}

func TestPresentToolGoesOn(t *testing.T) {
	t.Setenv("FARSIDE_REQUIRE", "all")
	if r := record(t, func(t testing.TB) { NeedTool(t, "go") }); r.skipped || r.failed {
		t.Errorf("skipped %v, failed %v", r.skipped, r.failed)
	}
}

// A losetup that knows of a free device but can't attach one is not enough.
func TestLoopIsTried(t *testing.T) {
	NeedRoot(t)
	dir := t.TempDir()
	script := "#!/bin/sh\n[ $# = 1 ] && echo /dev/loop0 && exit 0\necho cannot attach >&2\nexit 1\n"
	if err := os.WriteFile(dir+"/losetup", []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("FARSIDE_REQUIRE", "")
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	if r := record(t, NeedLoop); !r.skipped {
		t.Error("taken for a machine with loop devices")
	}
}

func TestLoopLeavesNothing(t *testing.T) {
	NeedLoop(t)
	mine := filepath.Dir(t.TempDir()) // of which each TempDir is a part
	for until := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		out, err := exec.Command("losetup", "--list", "--noheadings", "--output", "BACK-FILE").Output()
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(out), mine) {
			return
		}
		if time.Now().After(until) { // who looks at all devices keeps it a little longer
			t.Fatalf("still attached:\n%s", out)
		}
	}
}
