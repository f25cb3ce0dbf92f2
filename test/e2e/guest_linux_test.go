package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/capture/qemu"
	"farside/internal/demo/guest"
	"farside/internal/demo/stage"
	"farside/internal/testenv"
	"farside/test/load"
)

// guestInit is the init of a guest that writes: each commit is a line of a log that is synced before it is
// announced on the console; files come, grow, go and are trimmed beside it.
const guestInit = `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /mnt
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
for m in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$m; done
while [ ! -b /dev/vda ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 /dev/vda /mnt || echo "no mount"
n=0
while :; do
	n=$((n+1))
	echo $n | /bin/busybox dd of=/mnt/log oflag=append conv=notrunc,fsync 2>/dev/null
	echo "COMMIT $n"
	/bin/busybox dd if=/dev/urandom of=/mnt/data.$((n%9)) bs=4k count=$((n%23+1)) seek=$((n%5)) conv=notrunc 2>/dev/null
	[ $((n%9)) = 4 ] && /bin/busybox rm /mnt/data.$((n%8))
	[ $((n%16)) = 8 ] && /bin/busybox fstrim /mnt
	[ $((n%11)) = 3 ] && /bin/busybox sync
done
`

// guestLab is the far side of a guest.
type guestLab struct{ far }

// runningGuest is a QEMU with a guest that writes.
type runningGuest struct {
	t       *testing.T
	dir     string
	image   string
	cmd     *exec.Cmd
	monitor *qemu.Monitor
	work    sync.WaitGroup
	oracle  *load.Oracle

	mu struct {
		sync.Mutex
		last []string // of the console
	}
}

func startGuest(t *testing.T, dir, image string, oracle *load.Oracle) *runningGuest {
	t.Helper()
	m, err := guest.Find("../../.cache/guest-kernel", "/")
	if err != nil {
		testenv.Missing(t, "what a guest is made of: "+err.Error())
	}
	g := &runningGuest{t: t, dir: dir, image: image, oracle: oracle}
	initramfs := filepath.Join(dir, "initramfs")
	if err := m.Initramfs(initramfs, guestInit); err != nil {
		t.Fatal(err)
	}
	args := []string{"-m", "192", "-serial", "stdio", "-drive", "id=system,if=virtio,format=raw,discard=unmap,file=" + image}
	for _, name := range []string{"agent.qmp", "test.qmp"} {
		args = append(args, "-qmp", "unix:"+filepath.Join(dir, name)+",server=on,wait=off")
	}
	g.cmd = m.Command(context.Background(), "tcg", initramfs, "panic=-1", args...)
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	g.work.Go(func() { g.listen(out) })
	t.Cleanup(g.end)
	err = stage.Poll(t.Context(), 10*time.Second, "wait for qemu", func(ctx context.Context) (bool, error) {
		g.monitor, err = qemu.DialMonitor(ctx, filepath.Join(dir, "test.qmp"), nil)
		return err == nil, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// listen notes the commits that the guest announces.
func (g *runningGuest) listen(r io.Reader) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		now := time.Now()
		line := strings.TrimSpace(sc.Text())
		if n, err := strconv.ParseInt(strings.TrimPrefix(line, "COMMIT "), 10, 64); err == nil {
			g.oracle.Record(n, now)
			continue
		}
		g.mu.Lock()
		if g.mu.last = append(g.mu.last, line); len(g.mu.last) > 20 {
			g.mu.last = g.mu.last[1:]
		}
		g.mu.Unlock()
	}
}

// end ends the guest as a power cut does.
func (g *runningGuest) end() {
	if g.monitor != nil {
		g.monitor.Close()
	}
	_ = g.cmd.Process.Kill() // may have ended
	g.work.Wait()
	_ = g.cmd.Wait() // fails the second time
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.t.Failed() {
		g.t.Logf("console:\n%s", strings.Join(g.mu.last, "\n"))
	}
}

// pause stops the guest's processor; its writes are done when it returns.
func (g *runningGuest) pause() {
	g.t.Helper()
	if err := g.monitor.Run(g.t.Context(), "stop", nil, nil); err != nil {
		g.t.Fatal(err)
	}
}

// goesOn waits until the guest has committed n times more.
func (g *runningGuest) goesOn(n int64) {
	g.t.Helper()
	want := g.oracle.Last() + n
	err := stage.Poll(g.t.Context(), 30*time.Second, fmt.Sprintf("wait for %d commits of the guest", n), func(context.Context) (bool, error) {
		return g.oracle.Last() >= want, nil
	})
	if err != nil {
		g.t.Fatal(err)
	}
}

// TestGuestWithoutAgent: a guest of QEMU writes; an agent on the host captures it through a mirror, is killed and
// started again amid the writes; QEMU ends and comes back. Random positions of before and after the kill mount, pass the check and have every
// commit that was durable then; both ends equal the guest's image.
func TestGuestWithoutAgent(t *testing.T) {
	testenv.NeedLoop(t)
	testenv.NeedTool(t, "qemu-system-x86_64", "mkfs.ext4", "e2fsck")
	if testing.Short() {
		t.Skip("runs whole processes: not with -short")
	}
	t.Parallel()
	l := &guestLab{far{t: t, dir: workDir(t), fs: "ext4", size: 32 << 20}}
	image := filepath.Join(l.dir, "guest.img")
	if out, err := exec.Command("mkfs.ext4", "-q", image, "32M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	g := startGuest(t, l.dir, image, &l.oracle)
	capture := fmt.Sprintf("{driver: qemu, qemu: {monitor: %q, directory: %q, disks: [system]}}",
		filepath.Join(l.dir, "agent.qmp"), filepath.Join(l.dir, "sockets"))
	l.raise(stage.Options{
		Dir: l.dir, Program: program(t), Driver: "qemu", Settings: map[string]map[string]string{"agent": {"capture": capture}},
	})
	g.goesOn(1)
	f := &l.stage.Far
	if err := errors.Join(f.Offered(t.Context(), "qemu:system"), f.Protect(t.Context(), "qemu:system", "qemu")); err != nil {
		t.Fatal(err)
	}
	l.exact(time.Minute)
	time.Sleep(4 * time.Second)
	killed := time.Now()
	if err := l.stage.Halt("agent", true); err != nil {
		t.Fatal(err)
	}
	g.goesOn(10) // it does not wait for us
	if err := l.stage.Again("agent"); err != nil {
		t.Fatal(err)
	}
	l.exactSince(killed)
	time.Sleep(4 * time.Second)
	tag := l.endEqualsImage(g)
	l.judgeGuest(tag.GetPosition(), killed)

	g.end()
	ended := time.Now()
	err := stage.Poll(t.Context(), 20*time.Second, "wait until the guest's end is seen", func(ctx context.Context) (bool, error) {
		m, err := f.State(ctx)
		return m.GetState() != farsidev1.MachineState_MACHINE_STATE_PROTECTED, err
	})
	if err != nil {
		t.Fatal(err)
	}
	g = startGuest(t, l.dir, image, &load.Oracle{})
	l.exactSince(ended)
	g.goesOn(5)
	l.endEqualsImage(g)
}

// endEqualsImage pauses the guest and compares the present with its image.
func (l *guestLab) endEqualsImage(g *runningGuest) *farsidev1.TagPoint {
	l.t.Helper()
	g.pause()
	tag, err := l.stage.Far.Tag(l.t.Context(), "paused")
	if err != nil {
		l.t.Fatal(err)
	}
	want, err := os.ReadFile(g.image)
	if err != nil {
		l.t.Fatal(err)
	}
	if !bytes.Equal(l.read(tag.GetPosition()), want) {
		l.t.Error("the replica differs from the guest's image")
	}
	return tag
}

// raise sets the roles up.
func (l *guestLab) raise(o stage.Options) {
	l.t.Helper()
	var err error
	if l.stage, err = stage.Raise(l.t.Context(), o); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		if err := l.stage.Strike(); err != nil {
			l.t.Error(err)
		}
		if l.t.Failed() {
			for _, role := range []string{"agent", "process-server", "master-target"} {
				l.t.Logf("%s: %s", role, stage.LastLines(filepath.Join(l.dir, role+".log"), 15))
			}
		}
	})
}

// exactSince waits until the stream is exact with a newest point behind a moment.
func (l *guestLab) exactSince(moment time.Time) {
	l.t.Helper()
	err := stage.Poll(l.t.Context(), 60*time.Second, "wait until the stream is exact again", func(ctx context.Context) (bool, error) {
		m, err := l.stage.Far.State(ctx)
		return m.GetState() == farsidev1.MachineState_MACHINE_STATE_PROTECTED && m.GetNewest().GetTimeNs() > moment.UnixNano(), err
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// judgeGuest looks at random positions up to a tag.
func (l *guestLab) judgeGuest(until *farsidev1.Position, killed time.Time) {
	l.t.Helper()
	before, last := 0, int64(0)
	for i, p := range l.positions(rand.New(rand.NewPCG(7, 7)), 12, nil, until) {
		v := l.open(p, false)
		at := v.View.GetStatus().GetTimeNs()
		image := filepath.Join(l.scratch(), fmt.Sprintf("point%d.img", i))
		l.fetch(v, image)
		l.close(v)
		row, err := l.guestCommits(image)
		if durable := l.oracle.DurableBefore(at); err != nil || row < durable {
			l.t.Errorf("position %v: %d commits, %d were durable, %v", p, row, durable, err)
		}
		if row < last {
			l.t.Errorf("position %v: %d commits, an earlier one has %d", p, row, last)
		}
		if i == 0 && row >= l.oracle.Last() { // the check above can fail
			l.t.Errorf("the first position has all of %d commits", row)
		}
		if last = row; at < killed.UnixNano() {
			before++
		}
	}
	if before == 0 || before == 12 {
		l.t.Errorf("%d of 12 positions lie before the kill", before)
	}
	l.t.Logf("%d commits of the guest; 12 positions are right, %d of them before the agent was killed", l.oracle.Last(), before)
}

// guestCommits checks an image's file system and returns how many commits it has: all from 1 on without a gap.
func (l *guestLab) guestCommits(image string) (n int64, err error) {
	dir := filepath.Join(l.dir, "check")
	err = load.WithImage("ext4", image, dir, func() error {
		b, err := os.ReadFile(filepath.Join(dir, "log"))
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		for line := range strings.Lines(string(b)) {
			if n++; line != fmt.Sprintln(n) {
				return fmt.Errorf("line %d of the log is %q", n, line)
			}
		}
		return err
	})
	return n, err
}
