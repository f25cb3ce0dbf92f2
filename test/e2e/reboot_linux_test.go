package e2e

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
)

// TestReboot: a machine with an agent inside is rebooted in good order, and by its
// reset button under load. Each time something is written to the disk while no agent
// runs: behind its end, and before it is started again. Afterwards the far side
// holds what the disk holds, and older points are still right.
func TestReboot(t *testing.T) {
	t.Parallel()
	v := newVM(t)
	v.protected()
	v.load()
	v.exact(3 * time.Minute)
	time.Sleep(4 * time.Second)
	v.rest()
	first := v.headEqualsDisk("before any reboot")
	v.right(v.positions(rand.New(rand.NewPCG(3, 1)), 4, nil, first.GetPosition()))

	v.sh("mount /dev/vdb /data; kill $(cat /tmp/agent); while kill -0 $(cat /tmp/agent); do sleep 0.1; done")
	v.sh("head -c 300000 /dev/urandom > /data/behind-the-agent; sync; umount /data")
	if _, err := v.shell.Write([]byte("umount /state; reboot -f\n")); err != nil {
		t.Fatal(err)
	}
	v.back("rebooted", "reboot", true)

	v.load()
	time.Sleep(3 * time.Second)
	v.reset()
	v.back("reset", "unclean-stop", false)
}

// back waits for the guest and its agent after a boot, loads, and judges: the agent says
// why it does not go on where it was. It compares while nothing is written, so that only what was written
// behind its back is sent, or under load.
func (v *vm) back(name, why string, calm bool) {
	v.t.Helper()
	v.rebooted()
	row := v.oracle.Last()
	if !calm {
		v.load()
	}
	m := v.exact(3 * time.Minute)
	if calm {
		if again := m.GetCounters().GetBytesRead(); again == 0 || again > vmDisk/8 { // by the agent of this boot
			v.t.Errorf("%s: %d bytes were read to be sent, of a disk of %d that was compared", name, again, vmDisk)
		} else {
			v.t.Logf("%s: %d bytes were read to be sent, of a disk of %d", name, again, vmDisk)
		}
		v.load()
	}
	if !slices.ContainsFunc(m.GetEvents(), func(n *farsidev1.Notice) bool { return n.GetCode() == why }) {
		v.t.Errorf("%s: no event says %q: %v", name, why, m.GetEvents())
	}
	v.loaded(row)
	time.Sleep(2 * time.Second)
	v.rest()
	tag := v.headEqualsDisk(name)
	v.right(v.positions(rand.New(rand.NewPCG(3, 2)), 6, nil, tag.GetPosition()))
	v.sh("mount /dev/vdb /data")
	v.t.Logf("%s: %v\n%s", name, m.GetEvents(), v.log())
}

// TestClock: the clock of a machine with an agent inside jumps ten minutes ahead,
// then to two hours behind, under load. The stream stays exact or becomes so
// again; the head equals the disk, and what is found at positions behind the jump is
// whole and not older than the jump.
func TestClock(t *testing.T) {
	t.Parallel()
	v := newVM(t)
	v.protected()
	v.load()
	v.exact(3 * time.Minute)
	time.Sleep(2 * time.Second)
	for i, jump := range []time.Duration{10 * time.Minute, -130 * time.Minute} {
		before, err := v.stage.Far.Tag(t.Context(), fmt.Sprintf("before a jump by %v", jump))
		if err != nil {
			t.Fatal(err)
		}
		row := v.oracle.DurableBefore(before.GetTimeNs() - int64(time.Millisecond)) // the guest's clock both
		t.Logf("row %d before a jump by %v", row, jump)
		v.sh(fmt.Sprintf("date -s @$(($(date +%%s) + %d))", int64(jump/time.Second)))
		time.Sleep(3 * time.Second)
		v.exact(3 * time.Minute)
		v.rest()
		after := v.headEqualsDisk(fmt.Sprintf("after a jump by %v", jump))
		v.durable = func(int64) int64 { return row } // the oracle's times jumped, those of positions never go back
		v.right(v.positions(rand.New(rand.NewPCG(4, uint64(i))), 5, before.GetPosition(), after.GetPosition()))
		v.sh("mount /dev/vdb /data")
		v.load()
		time.Sleep(2 * time.Second)
		if row = v.oracle.Last(); row == 0 {
			t.Fatal("no load")
		}
	}
	t.Logf("%s", v.log())
}
