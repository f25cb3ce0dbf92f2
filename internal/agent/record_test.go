package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"testing"

	"farside/internal/blockdev"
	"farside/internal/capture"
	"farside/internal/dr"
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

func (s *shelf) record(boot string) *record {
	return newRecord(s, boot, slog.New(slog.DiscardHandler), func(string) (uint64, bool) { return 0, false })
}

// Each start tells why the stream may have to be compared.
func TestRecord(t *testing.T) {
	s := &shelf{files: map[string][]byte{}}
	for i, c := range []struct {
		boot  string
		ended bool // afterwards
		want  Reason
	}{
		{"a", false, ReasonUnknown}, // the first ever
		{"a", true, ReasonRestart},  // killed, the machine ran on
		{"a", true, ReasonRestart},
		{"b", false, ReasonReboot},
		{"c", true, ReasonUnclean},
		{"", true, ReasonUnknown}, // a system that does not tell
		{"c", true, ReasonUnknown},
		{"d", true, ReasonReboot},
	} {
		r := s.record(c.boot)
		if got, _ := r.begin(&blockdev.Machine{}); got.reason != c.want || got.text == "" {
			t.Errorf("start %d in boot %q: %s, want %s", i, c.boot, got, c.want)
		}
		if c.ended {
			r.ended()
		}
	}
	s.files[recordFile] = []byte(`{"boot":"d","ended":true}` + "\n") // of the first version
	if got, _ := s.record("e").begin(&blockdev.Machine{}); got.reason != ReasonReboot {
		t.Errorf("the first version: %s", got)
	}
	disk := `{"id":1,"path":"/dev/xda"}`
	for _, text := range []string{
		"", "{", `{"boot":5}`, "\x00", `{"version":3,"boot":"a"}`, `{"version":-1,"boot":"a"}`, `{"boot":"` + strings.Repeat("a", 300) + `"}`,
		`{"boot":"a","disks":[` + disk + "," + disk + "]}", `{"boot":"a","disks":[{"id":1,"size":-1}]}`, `{"boot":"a","disks":[{"id":70000}]}`,
		`{"boot":"a","disks":[{"id":1,"path":"` + strings.Repeat("a", 5000) + `"}]}`, `{"boot":"a"}` + strings.Repeat(" ", maxRecord),
	} {
		s.files[recordFile] = []byte(text)
		got, whole := s.record("e").begin(&blockdev.Machine{})
		if got.reason != ReasonUnknown || len(whole) != 0 {
			t.Errorf("%.60q: %s, %v", text, got, whole)
		}
	}
	s.fail = errors.New("the disk is full")
	if got, _ := s.record("f").begin(&blockdev.Machine{}); got.reason != ReasonUnknown {
		t.Errorf("no disk: %s", got)
	}
}

// TestRecordOfDisks: the next agent knows the disks, and whose copies are whole; nothing is written that is no news.
func TestRecordOfDisks(t *testing.T) {
	s := &shelf{files: map[string][]byte{}}
	count := uint64(5120)
	written := func(string) (uint64, bool) { return count, true }
	r := newRecord(s, "a", slog.New(slog.DiscardHandler), written)
	r.begin(&blockdev.Machine{})
	disks := []capture.Disk{{ID: 1, Path: "/dev/xda", Size: 4096}, {ID: 2, Path: "/dev/xdb", Size: 4096}}
	dev := blockdev.Device{Path: "/dev/xda", Name: "xda", Identity: blockdev.Identity{Serial: "S", DiskSeq: 4, Size: 4096}}
	known := map[dr.DiskID]blockdev.Device{1: dev}
	r.note(disks, known, map[dr.DiskID]bool{1: true})
	before := fmt.Sprintf("%p", s.files[recordFile])
	r.note(disks, known, map[dr.DiskID]bool{1: true})
	if fmt.Sprintf("%p", s.files[recordFile]) != before {
		t.Error("written though it was no news")
	}
	r.note(disks, known, map[dr.DiskID]bool{1: true, 2: true})
	r.ended()
	count += 1024
	got, whole := newRecord(s, "a", slog.New(slog.DiscardHandler), written).begin(&blockdev.Machine{Devices: []blockdev.Device{dev}})
	if got.reason != ReasonWritten || !strings.Contains(got.text, "1024 bytes (2 sectors)") || !whole[1] || !whole[2] {
		t.Errorf("%s, %v\n%s", got, whole, s.files[recordFile])
	}
	if l, err := parseLeft(s.files[recordFile]); err != nil || l.Ended || len(l.Disks) != 2 || l.Disks[0].Written != nil || l.Disks[0].Identity != "serial:S" {
		t.Errorf("%+v, %v", l, err)
	}
}

// TestAftermath holds the rows of docs/agent.md ("What an agent leaves") against explain.
func TestAftermath(t *testing.T) {
	n := uint64(1000 * 512)
	old := leftDisk{ID: 1, Path: "/dev/xda", Identity: "serial:S", Seq: 4, Size: 4096, Written: &n}
	for name, c := range map[string]struct {
		boot    string
		ended   bool
		now     blockdev.Identity
		written uint64 // 0: unknown
		want    Reason
		text    string
	}{
		"stopped, nothing written": {"a", true, blockdev.Identity{Serial: "S", DiskSeq: 4, Size: 4096}, n, ReasonRestart, "nothing was written"},
		"stopped, written":         {"a", true, blockdev.Identity{Serial: "S", DiskSeq: 4, Size: 4096}, n + 512, ReasonWritten, "(1 sectors)"},
		"stopped, not counted":     {"a", true, blockdev.Identity{Serial: "S", DiskSeq: 4, Size: 4096}, 0, ReasonRestart, "not known"},
		"counter went back":        {"a", true, blockdev.Identity{Serial: "S", DiskSeq: 4, Size: 4096}, n - 512, ReasonRestart, "not known"},
		"came anew":                {"a", true, blockdev.Identity{Serial: "S", DiskSeq: 5, Size: 4096}, n, ReasonExchanged, "came anew"},
		"grown":                    {"a", true, blockdev.Identity{Serial: "S", DiskSeq: 4, Size: 8192}, n, ReasonResized, "8192"},
		"shrunk":                   {"a", false, blockdev.Identity{Serial: "S", DiskSeq: 4, Size: 512}, n, ReasonResized, "killed"},
		"booted":                   {"b", true, blockdev.Identity{Serial: "S", DiskSeq: 1, Size: 4096}, n + 512, ReasonReboot, "in order"},
		"reset":                    {"b", false, blockdev.Identity{Serial: "S", DiskSeq: 1, Size: 4096}, 0, ReasonUnclean, "without warning"},
		"booted, another":          {"b", true, blockdev.Identity{Serial: "T", DiskSeq: 4, Size: 4096}, n, ReasonExchanged, "serial:T"},
		"reset, grown":             {"b", false, blockdev.Identity{Serial: "S", DiskSeq: 4, Size: 8192}, 0, ReasonResized, "without warning"},
		"booted, not named now":    {"b", true, blockdev.Identity{Size: 4096}, n, ReasonReboot, "in order"},
	} {
		m := &blockdev.Machine{Devices: []blockdev.Device{{Path: "/dev/xda", Identity: c.now}}}
		last := &left{Version: recordVersion, Boot: "a", Ended: c.ended, Disks: []leftDisk{old}}
		got := explain(last, c.boot, m, func(string) (uint64, bool) { return c.written, c.written > 0 })
		if got.reason != c.want || !strings.Contains(got.text, c.text) {
			t.Errorf("%s: %s; want %s, %q", name, got, c.want, c.text)
		}
		if got.reason.text() == string(got.reason) {
			t.Errorf("%s: the reason %q has no text", name, got.reason)
		}
	}
	m := &blockdev.Machine{Devices: []blockdev.Device{{Path: "/dev/xdb"}}}
	if got := explain(&left{Boot: "a", Disks: []leftDisk{old}}, "a", m, nil); got.reason != ReasonRestart {
		t.Errorf("a disk that is missing: %s", got)
	}
	m = &blockdev.Machine{Devices: []blockdev.Device{{Path: "/dev/xdq", Identity: blockdev.Identity{Serial: "S", DiskSeq: 4, Size: 4096}}}}
	count := func(path string) (uint64, bool) { return n, path == "/dev/xdq" }
	if got := explain(&left{Boot: "a", Ended: true, Disks: []leftDisk{old}}, "a", m, count); !strings.Contains(got.text, "nothing was written to /dev/xdq") {
		t.Errorf("a disk with another name: %s", got)
	}
}

// FuzzParseLeft: whatever is in the file, there is a reason.
func FuzzParseLeft(f *testing.F) {
	f.Add([]byte(`{"version":2,"boot":"a","ended":true,"disks":[{"id":1,"path":"/dev/xda","identity":"serial:S","seq":4,"size":4096,"written":7,"whole":true}]}`))
	f.Add([]byte(`{"boot":"a"}`))
	m := &blockdev.Machine{Devices: []blockdev.Device{{Path: "/dev/xda", Identity: blockdev.Identity{Serial: "S"}}}}
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseLeft(b)
		if err != nil && !errors.Is(err, dr.ErrCorrupt) && !errors.Is(err, dr.ErrUnsupported) {
			t.Error(err)
		}
		if got := explain(l, "a", m, func(string) (uint64, bool) { return 9, true }); got.reason == "" || got.text == "" {
			t.Errorf("%q: %s", b, got)
		}
	})
}
