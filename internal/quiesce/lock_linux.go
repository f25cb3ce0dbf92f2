package quiesce

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// LockProgram keeps the pages of the running program's file in memory once they were
// touched, and returns how many bytes of address space that covers. A program whose
// code was dropped reads it again from a disk that, while a file system is frozen, is busy
// with being made consistent, or hangs. Nothing else is locked: the heap is not
// backed by a file, and locked it could not be given back to the kernel.
func LockProgram() (int64, error) {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return 0, fmt.Errorf("lock program: %w", err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return 0, fmt.Errorf("lock program: %w", err)
	}
	var total int64
	for _, r := range fileMappings(string(maps), exe) {
		_, _, errno := unix.Syscall(unix.SYS_MLOCK2, r.from, r.to-r.from, unix.MLOCK_ONFAULT)
		if errno != 0 {
			return total, fmt.Errorf("lock program: %w", errno)
		}
		total += int64(r.to - r.from)
	}
	return total, nil
}

// mapping is a range of addresses.
type mapping struct{ from, to uintptr }

// fileMappings returns where a text of proc's maps says that a file is mapped.
func fileMappings(maps, file string) []mapping {
	var out []mapping
	for line := range strings.Lines(maps) {
		f := strings.Fields(line)
		if len(f) < 6 || strings.Join(f[5:], " ") != file {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		a, err1 := strconv.ParseUint(from, 16, 64)
		b, err2 := strconv.ParseUint(to, 16, 64)
		if err1 == nil && err2 == nil && a < b {
			out = append(out, mapping{uintptr(a), uintptr(b)})
		}
	}
	return out
}
