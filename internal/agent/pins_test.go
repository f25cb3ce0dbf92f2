package agent

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"farside/internal/dr"
	"farside/internal/transport"
)

// What is pinned, and is taken away, is this machine's. TestReleaseFromKernel (test/e2e) does it
// with a real capture.
func TestReleaseWithoutCapture(t *testing.T) {
	pins := t.TempDir()
	c := Config{Data: joined(t, transport.RoleAgent), Capture: CaptureConfig{Pin: pins}}
	other := filepath.Join(pins, dr.MachineID{1}.String())
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if removed, err := Release(c); removed || err != nil {
			t.Errorf("nothing is pinned: removed %v, %v", removed, err)
		}
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("another machine's pins: %v", err)
	}
	c.Capture.Pin = pinOff
	if removed, err := Release(c); removed || err != nil {
		t.Errorf("pin off: removed %v, %v", removed, err)
	}
}

func TestReleaseNeedsAgent(t *testing.T) {
	if _, err := Release(Config{Data: filepath.Join(t.TempDir(), "none")}); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("not joined: %v", err)
	}
	if _, err := Release(Config{Data: joined(t, transport.RoleProcessServer)}); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("joined as a process server: %v", err)
	}
}

func TestPinsAreOfOneMachine(t *testing.T) {
	m := dr.MachineID{1}
	for pin, want := range map[string]string{"": defaultPins + "/" + m.String(), "/x": "/x/" + m.String(), pinOff: ""} {
		if got := (&CaptureConfig{Pin: pin}).pins(m); got != filepath.FromSlash(want) {
			t.Errorf("pin %q: %q", pin, got)
		}
	}
}
