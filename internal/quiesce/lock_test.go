//go:build linux

package quiesce

import (
	"os"
	"slices"
	"strings"
	"testing"

	"farside/internal/testenv"
)

func TestFileMappings(t *testing.T) {
	t.Parallel()
	const maps = `00400000-00f5b000 r-xp 00000000 fe:00 131 /usr/bin/far side
00f5b000-01a00000 r--p 00b5b000 fe:00 131 /usr/bin/far side
01a00000-01b00000 rw-p 0 fe:00 131 /usr/bin/other
7ffd-1 r-xp 0 0:0 0 /usr/bin/far side
c000000000-c004000000 rw-p 00000000 00:00 0
nonsense
`
	want := []mapping{{0x400000, 0xf5b000}, {0xf5b000, 0x1a00000}}
	if got := fileMappings(maps, "/usr/bin/far side"); !slices.Equal(got, want) {
		t.Errorf("%x", got)
	}
}

// TestLockProgram: the program is locked, and that alone takes no memory.
func TestLockProgram(t *testing.T) {
	testenv.NeedRoot(t)
	before := status(t, "VmRSS:")
	n, err := LockProgram()
	if err != nil || n < 1<<20 {
		t.Fatalf("%d bytes, %v", n, err)
	}
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil || !strings.Contains(string(text), " lf ") && !strings.Contains(string(text), " lo ") {
		t.Errorf("nothing is locked: %v", err)
	}
	t.Logf("locked %d KiB of addresses; resident before %s, after %s", n>>10, before, status(t, "VmRSS:"))
}

// status returns a field of the process's status.
func status(t *testing.T, field string) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), field)
	line, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(line)
}
