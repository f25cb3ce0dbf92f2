package stage

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farside/internal/dr"
)

func TestPoll(t *testing.T) {
	n := 0
	if err := Poll(t.Context(), time.Minute, "count", func(context.Context) (bool, error) { n++; return n == 3, nil }); err != nil || n != 3 {
		t.Errorf("after %d rounds: %v", n, err)
	}
	err := Poll(t.Context(), 10*time.Millisecond, "wait for ever", func(context.Context) (bool, error) { return false, nil })
	if !errors.Is(err, dr.ErrUnavailable) || !strings.Contains(err.Error(), "wait for ever") {
		t.Errorf("got %v", err)
	}
	if err := Poll(t.Context(), time.Minute, "fail", func(context.Context) (bool, error) { return false, dr.ErrDenied }); !errors.Is(err, dr.ErrDenied) {
		t.Errorf("got %v", err)
	}
}

func TestProcess(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	p, err := Start("sleeper", log, exec.Command("sh", "-c", "echo ready; exec sleep 100"))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Ended(); err != nil {
		t.Error(err)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	if err := p.Ended(); err == nil || !strings.Contains(err.Error(), "sleeper has ended") {
		t.Errorf("got %v", err)
	}

	p, err = Start("failer", log, exec.Command("sh", "-c", "echo no such disk; exit 3"))
	if err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if err := p.Ended(); err == nil || !strings.Contains(err.Error(), "no such disk") {
		t.Errorf("got %v", err)
	}
	if _, err := Start("nothing", log, exec.Command(filepath.Join(t.TempDir(), "nothing"))); err == nil {
		t.Error("started nothing")
	}
}

// TestHaltAndAgain: a role that crashed, or was ended, is started again with the configuration that it had.
func TestHaltAndAgain(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, []byte("#!/bin/sh\ncat $3\nexec sleep 100\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	s := &Stage{Options: Options{Dir: dir, Program: program, Settings: map[string]map[string]string{"agent": {"memory": "32MiB", "listen": "other"}}}}
	defer s.Strike()
	if err := errors.Join(s.prepare("agent", map[string]string{"listen": "usual"}), s.Again("agent")); err != nil {
		t.Fatal(err)
	}
	for _, crash := range []bool{true, false} {
		if err := s.Halt("agent", crash); err != nil {
			t.Error(err)
		}
		if err := s.Halt("agent", crash); !errors.Is(err, dr.ErrNotFound) {
			t.Errorf("halted twice: %v", err)
		}
		if err := s.Ended(); err != nil {
			t.Errorf("who was halted is said to have ended: %v", err)
		}
		if err := s.Again("agent"); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, "agent.yaml"))
	if want := "data: " + dir + "/agent\nlisten: other\nmemory: 32MiB\n"; err != nil || string(b) != want {
		t.Errorf("configured with %q, want %q: %v", b, want, err)
	}
}
