package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/demo/stage"
	"farside/internal/testenv"
	"farside/test/load"
	"farside/test/messages"
)

// crowd is a lab with more machines: each an agent with a disk of its own. The first is
// the lab's.
type crowd struct {
	*lab
	loops  []*load.Loop
	mounts []string
	fars   []*stage.Far
}

const crowdDisk = 64 << 20

func newCrowd(t *testing.T, n int) *crowd {
	c := &crowd{lab: newLab(t, labOptions{size: crowdDisk})}
	c.loops, c.mounts, c.fars = []*load.Loop{c.loop}, []string{c.mount}, []*stage.Far{&c.stage.Far}
	for i := 1; i < n; i++ {
		loop, err := load.NewLoop(filepath.Join(c.dir, fmt.Sprintf("disk%d.img", i)), crowdDisk)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { loop.Close() })
		if err := loop.Format("ext4"); err != nil {
			t.Fatal(err)
		}
		mount := filepath.Join(c.dir, fmt.Sprintf("mnt%d", i))
		unmount, err := loop.Mount(mount)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unmount(); err != nil {
				t.Error(err)
			}
		})
		far, err := c.stage.AddAgent(t.Context(), fmt.Sprintf("agent-%d", i+1))
		if err != nil {
			t.Fatal(err)
		}
		c.loops, c.mounts, c.fars = append(c.loops, loop), append(c.mounts, mount), append(c.fars, &far)
	}
	for i, f := range c.fars {
		if err := errors.Join(f.Offered(t.Context(), c.loops[i].Device), f.Protect(t.Context(), c.loops[i].Device, "ebpf")); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// allExact waits until all streams are exact.
func (c *crowd) allExact() {
	c.t.Helper()
	for _, f := range c.fars {
		err := stage.Poll(c.t.Context(), 60*time.Second, "wait until all streams are exact", func(ctx context.Context) (bool, error) {
			m, err := f.State(ctx)
			return m.GetState() == farsidev1.MachineState_MACHINE_STATE_PROTECTED && m.GetNewest() != nil, errors.Join(err, c.stage.Ended())
		})
		if err != nil {
			c.t.Fatal(err)
		}
	}
}

// logAt reads the log of a machine as it was at a position.
func (c *crowd) logAt(i int, at *farsidev1.Position) *messages.Log {
	c.t.Helper()
	o, err := c.fars[i].Open(c.t.Context(), &farsidev1.Selector{Point: &farsidev1.Selector_Position{Position: at}}, false)
	if err != nil {
		c.t.Fatal(err)
	}
	defer func() {
		if err := c.fars[i].Close(c.t.Context(), o); err != nil {
			c.t.Error(err)
		}
	}()
	image := filepath.Join(c.scratch(), "disk.img")
	f, err := os.Create(image)
	if err != nil {
		c.t.Fatal(err)
	}
	_, err = io.Copy(f, io.NewSectionReader(o.Disk, 0, crowdDisk))
	if err := errors.Join(err, f.Close()); err != nil {
		c.t.Fatal(err)
	}
	loop, err := load.NewLoop(image, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	defer loop.Close()
	unmount, err := loop.Mount(filepath.Join(filepath.Dir(image), "mnt"))
	if err != nil {
		c.t.Fatal(err)
	}
	log, err := messages.ReadLog(filepath.Join(filepath.Dir(image), "mnt"))
	if err := errors.Join(err, unmount()); err != nil {
		c.t.Fatal(err)
	}
	return log
}

// violations compares the logs of all machines at their positions.
func (c *crowd) violations(at []*farsidev1.Position) ([]string, int) {
	c.t.Helper()
	var logs []*messages.Log
	received := 0
	for i, p := range at {
		logs = append(logs, c.logAt(i, p))
		received += len(logs[i].Received)
	}
	return messages.Violations(logs), received
}

// Three machines send each other numbered messages. At no group point is there a
// message that was received but not sent; tags that are merely asked for at about the same time
// show some: the negative control.
func TestGroupPointsAreOneInstant(t *testing.T) {
	testenv.NeedEBPF(t)
	c := newCrowd(t, 3)
	ctx := t.Context()
	c.allExact()
	set := &farsidev1.SetGroupRequest{Name: "ring", HoldLimitMs: 2000}
	for _, f := range c.fars {
		set.Machines = append(set.Machines, f.Machine)
	}
	if _, err := c.stage.Far.Client.SetGroup(ctx, set); err != nil {
		t.Fatal(err)
	}
	ring, err := messages.Start(c.mounts, 6)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ring.Stop(); err != nil {
			t.Error(err)
		}
	})
	const points = 5
	for i := range points {
		time.Sleep(300 * time.Millisecond) // messages go round
		r, err := c.stage.Far.Client.TagGroup(ctx, &farsidev1.TagGroupRequest{Group: "ring", Name: fmt.Sprintf("point %d", i), TimeoutMs: 20_000})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("point %d: held for %.0f ms, %v", i, r.GetTag().GetHeldMs(), r.GetTag().GetConsistency())
		if c := r.GetTag().GetConsistency(); c != farsidev1.Consistency_CONSISTENCY_FILESYSTEM {
			t.Errorf("point %d is %v consistent", i, c)
		}
	}
	var alone []*farsidev1.Position
	for _, f := range c.fars {
		tag, err := f.Tag(ctx, "alone")
		if err != nil {
			t.Fatal(err)
		}
		alone = append(alone, tag.GetPosition())
	}
	list, err := c.stage.Far.Client.ListGroupPoints(ctx, &farsidev1.ListGroupPointsRequest{Group: "ring"})
	if err != nil || len(list.GetPoints()) != points {
		t.Fatalf("points %v, %v", list.GetPoints(), err)
	}
	for _, p := range list.GetPoints() {
		if !p.GetComplete() {
			t.Errorf("%s is not complete", p.GetName())
			continue
		}
		at := make([]*farsidev1.Position, len(c.fars))
		for i, f := range c.fars {
			for _, m := range p.GetMembers() {
				if m.GetMachineId() == f.Machine {
					at[i] = m.GetPosition()
				}
			}
		}
		bad, received := c.violations(at)
		if len(bad) > 0 || received < 20 {
			t.Errorf("%s: %d effects without their cause among %d messages: %.3q", p.GetName(), len(bad), received, bad)
		}
	}
	if bad, received := c.violations(alone); len(bad) == 0 {
		t.Errorf("tags without a barrier show no violation among %d messages: this test has no power", received)
	}
}
