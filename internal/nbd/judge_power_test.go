package nbd

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"farside/internal/nbd/nbdtest"
	"farside/internal/testenv"
)

const breakEnv = "FARSIDE_TEST_BREAK"

// broken is a device with one of the faults that judges must see.
type broken struct {
	*testDevice
	how    string
	writes int
}

func (b *broken) WriteAt(p []byte, off int64) (int, error) {
	b.mu.Lock()
	b.writes++
	drop := b.how == "drops" && b.writes%20 == 0
	b.mu.Unlock()
	if drop {
		return len(p), nil
	}
	return b.testDevice.WriteAt(p, off)
}

func (b *broken) Zero(off, n int64) error {
	if b.how == "keeps" {
		return nil
	}
	return b.testDevice.Zero(off, n)
}

func (b *broken) Map(off, n int64, fn func(off, n int64, zero, hole bool) error) error {
	if b.how == "hides" {
		return fn(off, n, true, true)
	}
	return b.testDevice.Map(off, n, fn)
}

// faults are the faults, each with the judges that must see it.
var faults = map[string][]string{
	"drops": {"nbdsh", "nbdcopy", "qemu-img", "fio"}, // every 20th write
	"keeps": {"nbdsh", "qemu-io"},                    // what should become zero
	"hides": {"nbdsh", "nbdcopy", "qemu-img"},        // its data, in the map
}

// TestBrokenDevice fails on purpose; TestJudgesHavePower runs it.
func TestBrokenDevice(t *testing.T) {
	how := os.Getenv(breakEnv)
	if how == "" {
		t.Skip("run by TestJudgesHavePower")
	}
	const size = 24 << 20
	s := serve(t, Config{}, map[string]*Export{"x": {Device: &broken{testDevice: newTestDevice(size), how: how}}})
	nbdtest.Judge(t, s.uri("x"), size, nbdtest.Options{})
}

// TestJudgesHavePower: a broken device does not get through.
func TestJudgesHavePower(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a while")
	}
	testenv.NeedTool(t, "nbdsh", "nbdcopy", "qemu-img", "qemu-io", "fio")
	for how, judges := range faults {
		cmd := exec.Command(os.Args[0], "-test.run=^TestBrokenDevice$", "-test.v")
		cmd.Env = append(os.Environ(), breakEnv+"="+how)
		out, err := cmd.CombinedOutput()
		if err == nil {
			t.Errorf("nobody saw that the device %s\n%s", how, out)
		}
		for _, j := range judges {
			if !strings.Contains(string(out), "--- FAIL: TestBrokenDevice/"+j) {
				t.Errorf("%s did not see that the device %s", j, how)
			}
		}
	}
}
