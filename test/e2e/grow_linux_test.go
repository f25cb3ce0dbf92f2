package e2e

import (
	"os"
	"os/exec"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
)

// TestFireGrown: a disk grows under load, and its new end is written to before and after Farside
// knows of it, which nobody tells. Afterwards the head equals the device at its new size,
// and points from before are right. (To grow a mounted ext4 takes CAP_SYS_RESOURCE.)
func TestFireGrown(t *testing.T) {
	burn(t, labOptions{size: fireDisk, pin: true}, func(f *fire) {
		f.compare("before it grew")
		f.size += fireDisk / 2
		if err := os.Truncate(f.loop.File, f.size); err != nil {
			t.Fatal(err)
		}
		run := func(args ...string) {
			t.Helper()
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %v\n%s", args, err, out)
			}
		}
		fill := func(seek string) {
			t.Helper()
			run("dd", "if=/dev/urandom", "of="+f.loop.Device, "bs=1M", "count=8", "seek="+seek, "oflag=direct", "conv=notrunc", "status=none")
		}
		run("losetup", "-c", f.loop.Device)
		fill("200")
		began := time.Now()
		f.until(time.Minute, "the new size has arrived", func(m *farsidev1.Machine) bool {
			return len(m.GetDisks()) == 1 && m.GetDisks()[0].GetSize() == f.size
		})
		t.Logf("the new size was known after %.1f s", time.Since(began).Seconds())
		fill("204")
	}, "capture-restart")
}
