package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"farside/internal/dr"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"farside": main})
}

// TestScripts runs the command line as a person would: testdata/script/*.txtar.
func TestScripts(t *testing.T) {
	frames, err := filepath.Abs("../../internal/frame/testdata")
	if err != nil {
		t.Fatal(err)
	}
	segments, err := filepath.Abs("../../internal/segment/testdata")
	if err != nil {
		t.Fatal(err)
	}
	fake := startFake(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("FAKE", fake)
			env.Setenv("FRAMES", frames)
			env.Setenv("SEGMENTS", segments)
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits": exits,
			"flip":  flip,
			"join":  join,
			"cut":   cut,
		},
	})
}

// exits CODE COMMAND...: runs a command that must end with the code.
func exits(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND...")
	}
	code := "0"
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit interface{ ExitCode() int }
		if !errors.As(err, &exit) {
			ts.Fatalf("run %s: %v", args[1], err)
		}
		code = fmt.Sprint(exit.ExitCode())
	}
	if code != args[0] {
		ts.Fatalf("exit code %s, want %s", code, args[0])
	}
}

// flip FILE OFFSET: inverts one byte; a negative offset counts from the end.
func flip(ts *testscript.TestScript, _ bool, args []string) {
	path := ts.MkAbs(args[0])
	b, err := os.ReadFile(path)
	ts.Check(err)
	var off int
	_, err = fmt.Sscan(args[1], &off)
	ts.Check(err)
	if off < 0 {
		off += len(b)
	}
	b[off] ^= 0xff
	ts.Check(os.WriteFile(path, b, 0o644))
}

// join OUT FILE...: makes OUT of the contents of files.
func join(ts *testscript.TestScript, _ bool, args []string) {
	var all []byte
	for _, name := range args[1:] {
		b, err := os.ReadFile(ts.MkAbs(name))
		ts.Check(err)
		all = append(all, b...)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), all, 0o644))
}

// cut FILE SIZE: cuts a file short.
func cut(ts *testscript.TestScript, _ bool, args []string) {
	var n int64
	_, err := fmt.Sscan(args[1], &n)
	ts.Check(err)
	ts.Check(os.Truncate(ts.MkAbs(args[0]), n))
}

func TestExitCodes(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want int
	}{
		{nil, exitOK},
		{errors.New("anything"), exitFailure},
		{usage{errors.New("bad flag")}, exitUsage},
		{dr.ErrInvalid, exitUsage},
		{dr.ErrNotFound, exitNotFound},
		{dr.ErrNoPoint, exitNotFound},
		{fs.ErrNotExist, exitNotFound},
		{dr.ErrDenied, exitDenied},
		{dr.ErrTimeline, exitDenied},
		{dr.ErrCorrupt, exitCorrupt},
		{dr.ErrVersion, exitCorrupt},
		{dr.ErrGap, exitCorrupt},
		{dr.ErrUnavailable, exitUnavailable},
		{dr.ErrFull, exitUnavailable},
		{dr.ErrExists, exitExists},
		{dr.ErrUnsupported, exitUnsupported},
		{context.Canceled, exitInterrupted},
		{errors.Join(errors.New("x"), fmt.Errorf("y: %w", dr.ErrCorrupt)), exitCorrupt},
	} {
		wrapped := tc.err
		if wrapped != nil {
			wrapped = fmt.Errorf("do thing: %w", tc.err)
		}
		if got, _ := classify(wrapped); got != tc.want {
			t.Errorf("%v: exit code %d, want %d", wrapped, got, tc.want)
		}
	}
}

func TestHintOverridesKind(t *testing.T) {
	err := fmt.Errorf("outer: %w", withHint(dr.ErrDenied, "try %s", "this"))
	if code, hint := classify(err); code != exitDenied || hint != "try this" {
		t.Errorf("got %d %q", code, hint)
	}
	if withHint(nil, "x") != nil {
		t.Error("a hint made an error of nil")
	}
}
