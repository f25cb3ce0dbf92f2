//go:build unix

package quiesce

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// newHooks makes directories of hooks; scripts are named by phase and name.
func newHooks(t *testing.T, scripts map[string]string) *Hooks {
	t.Helper()
	dir := t.TempDir()
	h := &Hooks{
		Dir: dir, Run: dir + "/run", Logs: dir + "/logs", Owner: uint32(os.Getuid()),
		Each: 10 * time.Second, Total: 20 * time.Second,
	}
	for _, phase := range []string{preFreeze, postThaw} {
		if err := os.MkdirAll(dir+"/"+phase+".d", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range scripts {
		h.write(t, name, text, 0o755)
	}
	return h
}

func (h *Hooks) write(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	phase, base, _ := strings.Cut(name, "/")
	file := filepath.Join(h.Dir, phase+".d", base)
	syscall.ForkLock.RLock() // a child that inherits the file while it is open makes it "busy"
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(file, []byte("#!/bin/sh\n"+text+"\n"), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, mode); err != nil { // whatever the umask
		t.Fatal(err)
	}
}

// results shows what ran: phase/name, and ! where it failed.
func results(rs []HookResult) string {
	var out []string
	for _, r := range rs {
		text := r.Phase + "/" + r.Name
		if r.Err != nil {
			text += "!"
		}
		out = append(out, text)
	}
	return strings.Join(out, " ")
}

func TestHooks(t *testing.T) {
	t.Parallel()
	h := newHooks(t, map[string]string{
		"pre-freeze/20-b": `echo second >> $FARSIDE_RUN/order; echo on standard error >&2`,
		"pre-freeze/10-a": `echo first >> $FARSIDE_RUN/order; env`,
		"post-thaw/10-a":  `cat $FARSIDE_RUN/order; echo "$FARSIDE_RESULT $FARSIDE_REASON"; exit 3`,
		"post-thaw/20-b":  `echo went on`,
		"post-thaw/.x":    `exit 1`, "post-thaw/30-c~": `exit 1`, "post-thaw/40-d.disabled": `exit 1`, "post-thaw/50-e.dpkg-new": `exit 1`,
	})
	r, err := h.begin(Point{Machine: "m1", ID: "t1", Name: "before the cube; $(rm)"}, []string{"/", "/srv"})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.before(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.after(nil)
	rs, log := r.finish()
	if got := results(rs); got != "pre-freeze/10-a pre-freeze/20-b post-thaw/10-a! post-thaw/20-b" {
		t.Errorf("ran %s", got)
	}
	for _, want := range []string{
		"FARSIDE_MACHINE=m1\n", "FARSIDE_MOUNTS=/\n/srv\n", "FARSIDE_PHASE=pre-freeze\n", "FARSIDE_TAG=t1\n", "FARSIDE_TIMEOUT=10\n",
		"FARSIDE_TAG_NAME=before the cube; $(rm)\n", "PATH=/usr/local/sbin:", "FARSIDE_RESULT=\n",
	} {
		if !strings.Contains(string(rs[0].Output), want) {
			t.Errorf("environment lacks %q:\n%s", want, rs[0].Output)
		}
	}
	if n := strings.Count(string(rs[0].Output), "FARSIDE_"); n != 11 {
		t.Errorf("%d variables, want 11:\n%s", n, rs[0].Output)
	}
	if got := string(rs[2].Output); got != "first\nsecond\nok \n" {
		t.Errorf("post-thaw saw %q", got)
	}
	text, err := os.ReadFile(log)
	if err != nil || !strings.Contains(string(text), "on standard error") || !strings.Contains(string(text), "exit status 3") {
		t.Errorf("log %v:\n%s", err, text)
	}
	if left, _ := os.ReadDir(h.Run); len(left) != 0 { // made by begin
		t.Errorf("left behind: %v", left)
	}
}

// TestHookFails: the first failure ends the preparation and says which and why; what
// undoes it runs all the same.
func TestHookFails(t *testing.T) {
	t.Parallel()
	h := newHooks(t, map[string]string{
		"pre-freeze/10-a": `echo fine`,
		"pre-freeze/20-b": `echo no such database; exit 7`,
		"pre-freeze/30-c": `echo never`,
		"post-thaw/10-a":  `echo "$FARSIDE_RESULT: $FARSIDE_REASON"`,
	})
	var s stage
	s.add("/a", 0)
	_, err := s.prepare(t, Options{Hooks: h})
	if !errors.Is(err, ErrHook) || !strings.Contains(err.Error(), "pre-freeze/20-b") || !strings.Contains(err.Error(), "no such database") {
		t.Errorf("Prepare: %v", err)
	}
	s.liquid(t)
	logs, err := filepath.Glob(h.Logs + "/*")
	if err != nil || len(logs) != 1 {
		t.Fatal(logs, err)
	}
	text, err := os.ReadFile(logs[0])
	if err != nil || !strings.Contains(string(text), "failed: hook pre-freeze/20-b") || strings.Contains(string(text), "never") {
		t.Errorf("%v: %s", err, text)
	}
}

// TestHooksAroundAFreeze: they run before and behind it, also when it fails.
func TestHooksAroundAFreeze(t *testing.T) {
	t.Parallel()
	for _, limit := range []time.Duration{time.Minute, time.Nanosecond} {
		h := newHooks(t, map[string]string{"pre-freeze/a": `true`, "post-thaw/a": `echo $FARSIDE_RESULT`})
		var s stage
		s.add("/a", 0)
		x, err := s.prepare(t, Options{Hooks: h})
		if err != nil {
			t.Fatal(err)
		}
		held := x.Hold(t.Context(), limit)
		r, err := x.Release()
		want := "ok\n"
		if limit == time.Nanosecond {
			want = "failed\n"
		}
		if (held == nil) != (limit == time.Minute) || (err == nil) != (held == nil) || results(r.Hooks) != "pre-freeze/a post-thaw/a" || string(r.Hooks[1].Output) != want {
			t.Errorf("limit %s: %v, %v, %s", limit, held, err, results(r.Hooks))
		}
	}
}

func TestHookTimesOut(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name        string
		each, total time.Duration
		script      string
	}{
		{"one", 100 * time.Millisecond, time.Minute, `sleep 60`},
		{"all", time.Minute, 100 * time.Millisecond, `sleep 60`},
		{"stubborn", 100 * time.Millisecond, time.Minute, `trap '' TERM; sleep 60; sleep 60`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			h := newHooks(t, map[string]string{"pre-freeze/a": "echo $$ > " + t.TempDir() + "/pid; " + tc.script})
			h.Each, h.Total = tc.each, tc.total
			r, err := h.begin(Point{}, nil)
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if err := r.before(t.Context()); !errors.Is(err, ErrTimeout) || !errors.Is(err, ErrHook) {
				t.Errorf("it took long: %v", err)
			}
			if d := time.Since(began); d > 10*time.Second {
				t.Errorf("ended after %s", d)
			}
			r.finish()
		})
	}
}

func TestHookIsAborted(t *testing.T) {
	t.Parallel()
	h := newHooks(t, map[string]string{"pre-freeze/a": `sleep 60`, "post-thaw/a": `true`})
	r, err := h.begin(Point{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(100*time.Millisecond, cancel)
	if err := r.before(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("aborted: %v", err)
	}
	r.after(context.Canceled)
	if rs, _ := r.finish(); results(rs) != "pre-freeze/a! post-thaw/a" {
		t.Errorf("ran %s", results(rs))
	}
}

// TestHookLeavesSomethingRunning: what a hook left running neither holds it up nor dies with it.
func TestHookLeavesSomethingRunning(t *testing.T) {
	t.Parallel()
	h := newHooks(t, map[string]string{
		"pre-freeze/a": `sleep 60 & echo $! > $FARSIDE_RUN/pid; echo ready`,
		"post-thaw/a":  `kill $(cat $FARSIDE_RUN/pid)`,
	})
	r, err := h.begin(Point{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := r.before(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.after(nil)
	rs, _ := r.finish()
	if d := time.Since(began); d > 10*time.Second || results(rs) != "pre-freeze/a post-thaw/a" || string(rs[0].Output) != "ready\n" {
		t.Errorf("after %s: %s, %q", d, results(rs), rs[0].Output)
	}
}

func TestHookOutputIsBounded(t *testing.T) {
	t.Parallel()
	h := newHooks(t, map[string]string{"pre-freeze/a": `head -c 3000000 /dev/zero; exit 1`})
	r, err := h.begin(Point{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = r.before(t.Context())
	rs, _ := r.finish()
	if err == nil || len(err.Error()) > 1500 || len(rs[0].Output) != maxOutput {
		t.Errorf("%d bytes of output, error of %d bytes", len(rs[0].Output), len(err.Error()))
	}
}

// TestUnsafeHooks: nobody but root gets anything run as root.
func TestUnsafeHooks(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*testing.T, *Hooks) error{
		"writable by others": func(t *testing.T, h *Hooks) error { h.write(t, "pre-freeze/b", "true", 0o757); return nil },
		"writable by group":  func(t *testing.T, h *Hooks) error { h.write(t, "pre-freeze/b", "true", 0o775); return nil },
		"not executable":     func(t *testing.T, h *Hooks) error { h.write(t, "pre-freeze/b", "true", 0o644); return nil },
		"directory":          func(_ *testing.T, h *Hooks) error { return os.Mkdir(h.Dir+"/pre-freeze.d/b", 0o755) },
		"directory writable": func(_ *testing.T, h *Hooks) error { return os.Chmod(h.Dir+"/pre-freeze.d", 0o777) },
		"other owner":        func(_ *testing.T, h *Hooks) error { h.Owner++; return nil },
		"settings": func(_ *testing.T, h *Hooks) error {
			return errors.Join(os.WriteFile(h.Dir+"/hooks.conf", nil, 0o600), os.Chmod(h.Dir+"/hooks.conf", 0o666))
		},
		"dangling link": func(_ *testing.T, h *Hooks) error { return os.Symlink("/nowhere", h.Dir+"/pre-freeze.d/b") },
		"no hooks":      func(_ *testing.T, h *Hooks) error { return os.Remove(h.Dir + "/pre-freeze.d/a") },
		"no directory":  func(_ *testing.T, h *Hooks) error { return os.RemoveAll(h.Dir + "/pre-freeze.d") },
		"too many": func(t *testing.T, h *Hooks) error {
			for i := range maxHooks {
				h.write(t, fmt.Sprintf("pre-freeze/%d", i), "true", 0o755)
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHooks(t, map[string]string{"pre-freeze/a": "true"})
			if err := change(t, h); err != nil {
				t.Fatal(err)
			}
			if _, err := h.begin(Point{}, nil); !errors.Is(err, ErrHook) {
				t.Errorf("begin: %v", err)
			}
		})
	}
}

func TestLogsAreBounded(t *testing.T) {
	t.Parallel()
	h := newHooks(t, map[string]string{"pre-freeze/a": "true"})
	var newest string
	for range maxRuns + 3 {
		r, err := h.begin(Point{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.before(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, newest = r.finish()
	}
	logs, err := filepath.Glob(h.Logs + "/*")
	if err != nil || len(logs) > maxRuns || !slices.Contains(logs, newest) {
		t.Errorf("%d logs, %v", len(logs), err)
	}
	// A log that can't be written spoils nothing.
	h.Logs = "/dev/null/x"
	r, err := h.begin(Point{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.before(t.Context()); err != nil {
		t.Fatal(err)
	}
	if rs, log := r.finish(); len(rs) != 1 || log != "" {
		t.Errorf("%v, %q", rs, log)
	}
}

// TestRecover: a run that was cut off is undone by the next agent, once.
func TestRecover(t *testing.T) {
	t.Parallel()
	h := newHooks(t, map[string]string{"pre-freeze/a": "echo x > $FARSIDE_RUN/state", "post-thaw/a": "cat $FARSIDE_RUN/state; echo $FARSIDE_REASON"})
	r, err := h.begin(Point{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.before(t.Context()); err != nil {
		t.Fatal(err)
	}
	rs := h.Recover(Point{Machine: "m"})
	if results(rs) != "post-thaw/a" || !strings.HasPrefix(string(rs[0].Output), "x\nthe agent ended") {
		t.Errorf("%s %q", results(rs), rs[0].Output)
	}
	if rs := h.Recover(Point{}); len(rs) != 0 {
		t.Errorf("again: %s", results(rs))
	}
}
