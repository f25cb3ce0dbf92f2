package agent

import (
	"errors"
	"io/fs"
	"log/slog"
	"testing"
)

// shelf is a keeper in memory.
type shelf struct {
	files map[string][]byte
	fail  error
}

func (s *shelf) Keep(name string, b []byte) error {
	if s.fail == nil {
		s.files[name] = b
	}
	return s.fail
}

func (s *shelf) Kept(name string) ([]byte, error) {
	b, ok := s.files[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return b, s.fail
}

// Each start tells why the stream may have to be compared.
func TestRecord(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	s := &shelf{files: map[string][]byte{}}
	for i, c := range []struct {
		boot  string
		ended bool // afterwards
		want  Reason
	}{
		{"a", false, ReasonRestart}, // the first ever
		{"a", true, ReasonRestart},  // killed, the machine ran on
		{"a", true, ReasonRestart},
		{"b", false, ReasonReboot},
		{"c", true, ReasonUnclean},
		{"", true, ReasonRestart}, // a system that does not tell
		{"c", true, ReasonRestart},
		{"d", true, ReasonReboot},
	} {
		r := newRecord(s, c.boot)
		if got := r.reason(log); got != c.want {
			t.Errorf("start %d in boot %q: %s, want %s", i, c.boot, got, c.want)
		}
		if c.ended {
			r.ended(log)
		}
	}
	for _, text := range []string{"", "{", `{"boot":5}`, "\x00"} {
		s.files[recordFile] = []byte(text)
		if got := newRecord(s, "e").reason(log); got != ReasonRestart {
			t.Errorf("%q: %s", text, got)
		}
	}
	s.fail = errors.New("the disk is full")
	if got := newRecord(s, "f").reason(log); got != ReasonRestart {
		t.Errorf("no disk: %s", got)
	}
}
