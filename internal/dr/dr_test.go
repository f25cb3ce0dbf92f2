package dr

import (
	"errors"
	"testing"
)

func TestPositionText(t *testing.T) {
	p := Position{Timeline: 3, Seq: 18446744073709551615}
	if got, err := ParsePosition(p.String()); err != nil || got != p {
		t.Errorf("%v: %v %v", p, got, err)
	}
	for _, bad := range []string{"", "1", "1:", ":1", "4294967296:1", "1:-1", "1:2:3", "a:b"} {
		if _, err := ParsePosition(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestIDText(t *testing.T) {
	m, n := NewMachineID(), NewNodeID()
	if got, err := ParseMachineID(m.String()); err != nil || got != m || m.IsZero() {
		t.Errorf("%v: %v %v", m, got, err)
	}
	var back NodeID
	text, _ := n.MarshalText()
	if err := back.UnmarshalText(text); err != nil || back != n || n.IsZero() {
		t.Errorf("%v: %v %v", n, back, err)
	}
	if m.String()[14] != '4' {
		t.Errorf("%v is no version 4 UUID", m)
	}
	for _, bad := range []string{"", "x", m.String()[1:], m.String() + "0", "zz" + m.String()[2:]} {
		if _, err := ParseMachineID(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestSizeText(t *testing.T) {
	for text, want := range map[string]Size{"0": 0, "4096": 4096, "64KiB": 64 << 10, " 3 MiB": 3 << 20, "1GiB": 1 << 30, "2TiB": 2 << 40} {
		var s, again Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want {
			t.Errorf("%q: %d %v", text, s, err)
		}
		if err := again.UnmarshalText([]byte(s.String())); err != nil || again != s {
			t.Errorf("%d as %q: %d %v", s, s, again, err)
		}
	}
	for _, bad := range []string{"", "x", "-1", "1MB", "5000000000TiB", "1.5GiB"} {
		var s Size
		if err := s.UnmarshalText([]byte(bad)); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestNames(t *testing.T) {
	for got, want := range map[string]string{
		Data.String(): "data", Zero.String(): "zero", Discard.String(): "discard", What(9).String(): "what(9)",
		Exact.String(): "exact", Epoch.String(): "epoch", Accuracy(9).String(): "accuracy(9)",
		Crash.String(): "crash", FileSystem.String(): "filesystem", Application.String(): "application", Consistency(9).String(): "consistency(9)",
		Extent{Disk: 1, Offset: 512, Length: 1024}.String(): "1:[512,1536)",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
