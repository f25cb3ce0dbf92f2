// Package testenv tells tests what this machine can do. A test that needs more
// than a plain user account asks here and is skipped with the reason when it
// is missing; with FARSIDE_REQUIRE=all, which CI sets on machines that can do
// all of it, it fails instead.
//
// It is imported by tests only, decides by trying (not by the existence of a
// file alone) where trying is cheap, and leaves nothing behind on the machine.
// It is safe for concurrent use.
package testenv

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// Missing skips t with the reason, or fails it if FARSIDE_REQUIRE says so.
func Missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("FARSIDE_REQUIRE") == "all" {
		t.Fatalf("missing here, but FARSIDE_REQUIRE=all: %s", what)
	}
	t.Skipf("skipped: needs %s", what)
}

// NeedRoot asks for uid 0 on Linux.
func NeedRoot(t testing.TB) {
	t.Helper()
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		Missing(t, "root on Linux")
	}
}

// NeedTool asks for programs in PATH.
func NeedTool(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			Missing(t, "the program "+name)
		}
	}
}

// NeedLoop asks for loop devices that can be attached. It attaches a file of
// its own and detaches it.
func NeedLoop(t testing.TB) {
	t.Helper()
	NeedRoot(t)
	NeedTool(t, "losetup")
	var err error
	for range 10 { // another process may attach, or remove, the device that losetup has found
		if err = tryLoop(t.TempDir()); err == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	Missing(t, "a loop device that can be attached: "+err.Error())
}

func tryLoop(dir string) error {
	file := filepath.Join(dir, "loop")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		return err
	}
	out, err := exec.Command("losetup", "--find", "--show", "--read-only", file).CombinedOutput()
	device := strings.TrimSpace(string(out))
	if err != nil {
		return fmt.Errorf("losetup: %w: %s", err, device)
	}
	if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
		return fmt.Errorf("detach %s: %w: %s", device, err, out)
	}
	return nil
}

// NeedEBPF asks for root and a kernel that describes its types (BTF), without
// which capture programs can't be loaded.
func NeedEBPF(t testing.TB) {
	t.Helper()
	NeedRoot(t)
	f, err := os.Open("/sys/kernel/btf/vmlinux")
	if err != nil {
		Missing(t, "a kernel with BTF: "+err.Error())
		return
	}
	f.Close()
}

// NeedBench asks for FARSIDE_BENCH=1, which "make bench" sets: benchmarks that
// take minutes are no part of the tests. FARSIDE_REQUIRE does not change that.
func NeedBench(t testing.TB) {
	t.Helper()
	if os.Getenv("FARSIDE_BENCH") != "1" {
		t.Skip("skipped: a benchmark; run it with make bench")
	}
}
