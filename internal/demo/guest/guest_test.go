package guest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farside/internal/testenv"
)

// machine finds the parts of a guest, or skips.
func machine(t *testing.T) *Machine {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a guest: not with -short")
	}
	t.Parallel() // a guest has one slow CPU
	m, err := Find("../../../.cache/guest-kernel", "/")
	if err != nil {
		testenv.Missing(t, "what a guest is made of: "+err.Error())
	}
	return m
}

func TestBootSumsFiles(t *testing.T) {
	m := machine(t)
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	content := strings.Repeat("every write is a point\n", 10000)
	if err := os.WriteFile(filepath.Join(root, "data"), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "image")
	if out, err := exec.Command("/sbin/mkfs.ext4", "-q", "-d", root, image, "16M").CombinedOutput(); err != nil {
		t.Skipf("mkfs.ext4: %v: %s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	report, err := m.Boot(ctx, Task{Disk: image, Accel: "tcg", Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(content))
	if !report.Marker || report.Sums["data"] != hex.EncodeToString(sum[:]) {
		t.Errorf("marker %v, sums %v; console:\n%s", report.Marker, report.Sums, report.Log)
	}
	t.Logf("took %v", report.Took)
}

func TestBootSumsDisk(t *testing.T) {
	m := machine(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	content := []byte(strings.Repeat("0123456789abcdef", 8192))
	if err := os.WriteFile(image, content, 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	report, err := m.Boot(ctx, Task{Disk: image, Sum: 5000, Accel: "tcg", Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(content[:5000])
	if !report.Marker || report.Sums["disk"] != hex.EncodeToString(sum[:]) {
		t.Errorf("marker %v, sums %v; console:\n%s", report.Marker, report.Sums, report.Log)
	}
}

// TestBootOfGarbage: a disk without a file system must not give a marker.
func TestBootOfGarbage(t *testing.T) {
	m := machine(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	report, err := m.Boot(ctx, Task{Disk: image, Accel: "tcg", Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if report.Marker {
		t.Errorf("a marker from a disk of zeroes; console:\n%s", report.Log)
	}
}

func TestBootIsCanceled(t *testing.T) {
	m := machine(t)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := m.Boot(ctx, Task{Sum: -1, Accel: "tcg", Dir: t.TempDir()}); err == nil {
		t.Error("no error from a boot that was canceled")
	}
}

func TestFindNothing(t *testing.T) {
	if _, err := Find(t.TempDir()); err == nil {
		t.Error("found a kernel in an empty directory")
	}
}

func TestArchive(t *testing.T) {
	var a archive
	a.add("dir", modeDir|0o755, nil)
	a.add("dir/file", modeFile|0o644, []byte("content"))
	b := a.bytes()
	if len(b)%4 != 0 || !strings.HasPrefix(string(b), "070701") {
		t.Fatalf("%d bytes, starts with %q", len(b), b[:6])
	}
	testenv.NeedTool(t, "cpio")
	dir := t.TempDir()
	cmd := exec.Command("cpio", "-idm", "--quiet")
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(string(b))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "dir/file")); err != nil || string(got) != "content" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestModuleName(t *testing.T) {
	for path, want := range map[string]string{
		"kernel/a/crc32c-intel.ko": "crc32c_intel", "virtio_blk.ko.xz": "virtio_blk", "ext4.ko.zst": "ext4",
	} {
		if got := moduleName(path); got != want {
			t.Errorf("%s: got %s, want %s", path, got, want)
		}
	}
}

// TestAccel: whatever the probe says must work.
func TestAccel(t *testing.T) {
	m := machine(t)
	start := time.Now()
	accel := m.Accel(t.Context(), t.TempDir())
	t.Logf("%s, found in %v", accel, time.Since(start))
	report, err := m.Boot(t.Context(), Task{Sum: -1, Accel: accel, Dir: t.TempDir()})
	if err != nil || !report.Marker {
		t.Errorf("%s does not work: %v\n%s", accel, err, report.Log)
	}
}
