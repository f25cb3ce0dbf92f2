package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// TestReleaseFromKernel: what an agent leaves in the kernel is taken out of it by a verb, not as
// long as the agent runs; the agent that follows compares the disks, and knows that they were written.
func TestReleaseFromKernel(t *testing.T) {
	burn(t, labOptions{size: fireDisk, pin: true}, func(f *fire) {
		pinned := func() int {
			t.Helper()
			of, err := filepath.Glob(filepath.Join(f.dir, "bpf", "farside", "*", "*"))
			if err != nil {
				t.Fatal(err)
			}
			return len(of)
		}
		release := func() error {
			out, err := exec.Command(f.stage.Program, "agent", "release", "--config", filepath.Join(f.dir, "agent.yaml")).CombinedOutput()
			t.Logf("release: %s", out)
			return err
		}
		if release() == nil {
			t.Error("released while the agent runs")
		}
		if err := f.stage.Halt("agent", false); err != nil {
			t.Fatal(err)
		}
		if pinned() == 0 {
			t.Error("nothing is pinned when the agent has ended")
		}
		if err := release(); err != nil {
			t.Error(err)
		}
		if n := pinned(); n > 0 {
			t.Errorf("%d objects are still pinned", n)
		}
		if _, err := os.Stat(filepath.Join(f.dir, "bpf", "farside")); err != nil {
			t.Error(err)
		}
		if err := f.stage.Again("agent"); err != nil {
			t.Fatal(err)
		}
		f.exact(time.Minute)
	}, "disk-written")
}
