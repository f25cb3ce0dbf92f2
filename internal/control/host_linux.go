package control

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	farsidev1 "farside/internal/api/farside/v1"
)

// fillHost adds what Linux tells; what can't be read stays empty.
func fillHost(h *farsidev1.HostInfo) {
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var s unix.Sysinfo_t
	if unix.Sysinfo(&s) == nil {
		h.MemoryBytes = int64(s.Totalram) * int64(s.Unit)
	}
	if b, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		h.BootId = strings.TrimSpace(string(b))
	}
	if b, err := os.ReadFile("/proc/stat"); err == nil {
		h.BootNs = bootTime(string(b))
	}
	if b, err := os.ReadFile("/etc/os-release"); err == nil {
		h.Distribution = prettyName(string(b))
	}
}

// bootTime reads the line "btime SECONDS" of /proc/stat.
func bootTime(stat string) int64 {
	for line := range strings.Lines(stat) {
		if s, ok := strings.CutPrefix(line, "btime "); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(s), 10, 64)
			if err == nil {
				return n * 1e9
			}
		}
	}
	return 0
}

// prettyName reads PRETTY_NAME of /etc/os-release.
func prettyName(release string) string {
	for line := range strings.Lines(release) {
		if s, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			return strings.Trim(strings.TrimSpace(s), `"'`)
		}
	}
	return ""
}
