package vfs

import (
	"bytes"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"testing"
)

// outcomes runs Crash with many seeds and counts what read returns.
func outcomes(m *Mem, what func(*Mem) string) map[string]int {
	seen := map[string]int{}
	for seed := range uint64(200) {
		seen[what(m.Crash(seed))]++
	}
	return seen
}

func content(name string) func(*Mem) string {
	return func(m *Mem) string {
		b, err := ReadFile(m, name, 1<<20)
		if err != nil {
			return "none"
		}
		return string(b)
	}
}

func TestCrashKeepsWhatWasSynced(t *testing.T) {
	m := NewMem()
	write(t, m, "/a", "synced")
	if got := outcomes(m, content("/a")); got["none"] == 0 || got["synced"] == 0 {
		t.Errorf("a name that was not synced may be there or not: %v", got)
	}
	m.SyncDir("/")
	if got := outcomes(m, content("/a")); got["synced"] != 200 {
		t.Errorf("synced data and name: %v", got)
	}
	f := must(m.OpenFile("/a"))
	must(f.WriteAt([]byte("SYNCED"), 0))
	if got := outcomes(m, content("/a")); got["synced"] == 0 || got["SYNCED"] == 0 || len(got) != 2 {
		t.Errorf("one sector is old or new, never mixed: %v", got)
	}
	if read(t, m, "/a") != "SYNCED" {
		t.Error("Crash must not touch the living")
	}
}

func TestCrashTearsAtSectors(t *testing.T) {
	m := NewMem()
	write(t, m, "/a", strings.Repeat("o", 2048))
	m.SyncDir("/")
	f := must(m.OpenFile("/a"))
	must(f.WriteAt(bytes.Repeat([]byte("n"), 2048), 0))
	got := outcomes(m, content("/a"))
	if len(got) != 16 {
		t.Errorf("4 sectors, each old or new, make 16 outcomes, not %d", len(got))
	}
	for s := range got {
		for i := 0; i < len(s); i += 512 {
			if strings.Count(s[i:i+512], s[i:i+1]) != 512 {
				t.Fatal("a sector is torn")
			}
		}
	}
	f.Sync()
	if got := outcomes(m, content("/a")); len(got) != 1 {
		t.Errorf("%d outcomes after Sync", len(got))
	}
}

func TestCrashSize(t *testing.T) {
	m := NewMem()
	write(t, m, "/a", "12345")
	m.SyncDir("/")
	f := must(m.OpenFile("/a"))
	must(f.WriteAt([]byte("x"), 9))
	sizes := outcomes(m, func(m *Mem) string { return string(rune('0' + must(m.Stat("/a")).Size)) })
	for s := range sizes {
		if s < "5" || s > ":" {
			t.Errorf("size %v", sizes)
		}
	}
	if len(sizes) < 2 {
		t.Errorf("sizes %v", sizes)
	}
}

func TestCrashRename(t *testing.T) {
	m := NewMem()
	write(t, m, "/state", "old")
	m.SyncDir("/")
	write(t, m, "/state.new", "new")
	m.Rename("/state.new", "/state")
	if got := outcomes(m, content("/state")); got["old"] == 0 || got["new"] == 0 || len(got) != 2 {
		t.Errorf("a rename is atomic: %v", got)
	}
	m.SyncDir("/")
	if got := outcomes(m, content("/state")); got["new"] != 200 {
		t.Errorf("after SyncDir: %v", got)
	}
	m.Remove("/state")
	if got := outcomes(m, content("/state")); got["new"] == 0 || got["none"] == 0 {
		t.Errorf("a removal that was not synced: %v", got)
	}
}

func TestCrashOrderWithinDirectory(t *testing.T) {
	m := NewMem()
	for _, name := range []string{"/1", "/2", "/3"} {
		write(t, m, name, name)
	}
	got := outcomes(m, func(m *Mem) string { return strings.Join(must(m.List("/")), "") })
	want := []string{"", "1", "12", "123"}
	for s := range got {
		if !slices.Contains(want, s) {
			t.Errorf("entries %q: not a prefix of the changes", s)
		}
	}
	if len(got) != len(want) {
		t.Errorf("outcomes %v", got)
	}
}

// Negative control: without the rename, replacing a file is not atomic, and the
// model of a crash must show it.
func TestCrashFindsUnsafeReplace(t *testing.T) {
	m := NewMem()
	write(t, m, "/state", strings.Repeat("o", 1024))
	m.SyncDir("/")
	f := must(m.Create("/state"))
	must(f.WriteAt(bytes.Repeat([]byte("n"), 1024), 0))
	bad := 0
	for s, n := range outcomes(m, content("/state")) {
		if s != strings.Repeat("o", 1024) && s != strings.Repeat("n", 1024) {
			bad += n
		}
	}
	if bad == 0 {
		t.Error("no crash broke the file")
	}
}

func TestReplaceFileAtEveryCrash(t *testing.T) {
	for stop := 0; ; stop++ {
		m := NewMem()
		write(t, m, "/state", "old")
		m.SyncDir("/")
		n := 0
		power := errors.New("power cut")
		faulty := NewFault(m, func(op Op) error {
			if n++; n > stop {
				return power
			}
			return nil
		})
		err := ReplaceFile(faulty, "/", "/state", []byte("new"))
		for s := range outcomes(m, content("/state")) {
			if s != "old" && s != "new" || err == nil && s != "new" {
				t.Fatalf("stopped before call %d (%v): %q", stop, err, s)
			}
		}
		if err == nil {
			return
		}
		if !errors.Is(err, power) {
			t.Fatal(err)
		}
	}
}

func TestFaultInjection(t *testing.T) {
	boom := errors.New("boom")
	for _, kind := range []OpKind{
		OpCreate, OpOpen, OpOpenFile, OpRemove, OpRename, OpMkdir, OpSyncDir, OpList, OpStat, OpLock,
		OpRead, OpWrite, OpTruncate, OpSync, OpSize, OpPunch,
	} {
		armed := false
		fsys := NewFault(NewMem(), func(op Op) error {
			if armed && op.Kind == kind {
				return boom
			}
			return nil
		})
		f := must(fsys.Create("/f"))
		armed = true
		_, werr := f.WriteAt([]byte("x"), 0)
		_, rerr := f.ReadAt(make([]byte, 1), 0)
		if errors.Is(rerr, boom) != (kind == OpRead) {
			t.Errorf("%s: read %v", kind, rerr)
		}
		got := errors.Join(
			werr, f.Truncate(1), f.Sync(), second(f.Size()), PunchHole(f, 0, 1), second(fsys.Create("/g")), second(fsys.Open("/f")),
			second(fsys.OpenFile("/f")), fsys.MkdirAll("/d"), fsys.SyncDir("/"), second(fsys.List("/")), second(fsys.Stat("/f")),
			second(fsys.Lock("/l")), fsys.Rename("/f", "/h"), fsys.Remove("/h"), rerr)
		if !errors.Is(got, boom) {
			t.Errorf("%s: not injected: %v", kind, got)
		}
	}
}

func TestShortWrite(t *testing.T) {
	full := errors.New("disk full")
	fsys := NewFault(NewMem(), func(op Op) error {
		if op.Kind == OpWrite {
			return &ShortWrite{N: 2, Err: full}
		}
		return nil
	})
	f := must(fsys.Create("/f"))
	if n, err := f.WriteAt([]byte("abcd"), 0); n != 2 || !errors.Is(err, full) {
		t.Errorf("short write: %d %v", n, err)
	}
	if read(t, fsys, "/f") != "ab" {
		t.Error("not the first bytes were written")
	}
	if _, err := fsys.Open("/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
