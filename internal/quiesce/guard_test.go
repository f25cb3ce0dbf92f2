//go:build linux

package quiesce

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"farside/internal/dr"
)

// TestGuardThatIsNone: a program that ends, or says something else, is no watchdog.
func TestGuardThatIsNone(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"-test.run=^$"}, {"-test.nonsense"}, {agentVerb, "1s", "/dev/none"}} {
		began := time.Now()
		_, err := startGuard(args, nil)
		if !errors.Is(err, dr.ErrUnavailable) || !strings.Contains(err.Error(), "died") {
			t.Errorf("%v: %v after %s", args, err, time.Since(began))
		}
	}
}

// TestGuardLife: it answers as long as it lives, and what is sent to a dead one is an error.
func TestGuardLife(t *testing.T) {
	t.Parallel()
	d, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	g, err := startGuard([]string{WatchdogVerb}, []*os.File{d})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := errors.Join(g.Arm(time.Minute), g.Freezing(0)); err != nil {
			t.Error(err)
		}
		g.Thawed(0)
	}
	select {
	case <-g.Gone():
		t.Fatal("it has gone")
	default:
	}
	pid := g.(*process).cmd.Process.Pid
	unix.Kill(pid, unix.SIGTERM) // ignored
	if err := g.Arm(time.Minute); err != nil {
		t.Errorf("behind SIGTERM: %v", err)
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	<-g.Gone()
	if unix.Kill(pid, 0) == nil {
		t.Error("it lives on")
	}
	if err := g.Arm(time.Minute); err == nil {
		t.Error("a dead one was armed")
	}
	if err := g.Freezing(0); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("a dead one was told: %v", err)
	}
	g.Thawed(0) // nobody hears it
}

// TestGuardsSideBySide: each has its own files and its own end.
func TestGuardsSideBySide(t *testing.T) {
	t.Parallel()
	a, err := startGuard([]string{WatchdogVerb}, nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := startGuard([]string{WatchdogVerb}, nil)
	if err != nil {
		t.Fatal(err)
	}
	// If b had inherited a's pipe, a would not notice the end of ours.
	p := a.(*process)
	if err := p.orders.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-a.Gone():
	case <-time.After(10 * time.Second):
		t.Error("the end of the pipe was not noticed")
	}
	p.kill()
	if err := b.Arm(time.Second); err != nil {
		t.Error(err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}
