package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"

	"farside/internal/demo/guest"
	"farside/internal/demo/stage"
	"farside/internal/testenv"
)

// vmInit is run by the guest's kernel. What was mounted and written before the
// agent is started has been seen by nobody: as at the boot of a real machine. The
// first port is a shell for the test, the second tells of commits.
const vmInit = `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/
mkdir -p /proc /sys /state /data /tmp /run
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t bpf bpf /sys/fs/bpf
for m in $(cat /modules/order); do insmod /modules/$m; done
n=0; while [ ! -b /dev/vdb ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n+1)); done
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route add default via 10.0.2.2
hostname guest
mount -t ext4 /dev/vda /state && mount -t ext4 /dev/vdb /data || echo mount failed
head -c 200000 /dev/urandom > /data/before-the-agent
date >> /data/boots
sync
(cd /state; exec ./farside agent --config /state/agent.yaml </dev/null >>/state/agent.log 2>&1) &
echo $! > /tmp/agent
echo FARSIDE-GUEST-UP
n=0; while [ ! -c /dev/vport?p2 ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n+1)); done
exec 3<>$(echo /dev/vport?p1)
cat <&3 | sh >&3 2>&1
`

// vm is a guest with an agent inside, whose disk a stage on the host replicates.
type vm struct {
	far
	disk  string // image of the protected disk
	shell net.Conn
	said  *bufio.Reader
	qmp   net.Conn
	asked int // commands that were answered
	lines sync.WaitGroup

	bootID   string // of the boot that was seen last
	agentLog string // as it was when it was last asked for
}

const vmDisk = 128 << 20

// newVM boots a guest. The agent dials the host through QEMU's user network.
func newVM(t *testing.T) *vm {
	testenv.NeedTool(t, "mkfs.ext4", "e2fsck", "qemu-system-x86_64")
	testenv.NeedLoop(t) // to judge
	m, err := guest.Find("../../.cache/guest-kernel")
	if err != nil {
		testenv.Missing(t, "what a guest is made of: "+err.Error())
	}
	v := &vm{far: far{t: t, dir: workDir(t), fs: "ext4", size: vmDisk}}
	v.disk = filepath.Join(v.dir, "disk.img")
	p, ps := freePort(t), freePort(t)
	v.stage, err = stage.Raise(t.Context(), stage.Options{
		Dir: v.dir, Program: program(t), Driver: "ebpf", Ring: "16MiB", Pin: "/sys/fs/bpf/farside", Elsewhere: true,
		Settings: map[string]map[string]string{
			"config-server":  {"listen": "127.0.0.1:" + p, "advertise": fmt.Sprintf("[127.0.0.1:%[1]s, 10.0.2.2:%[1]s]", p)},
			"process-server": {"listen": "127.0.0.1:" + ps, "advertise": "10.0.2.2:" + ps},
			"agent":          {"data": "/state/agent", "memory": "32MiB"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.stage.Strike(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("agent: %s", v.agentLog)
			t.Logf("console: %s", stage.LastLines(filepath.Join(v.dir, "console"), 30))
			for _, role := range []string{"process-server", "master-target", "config-server"} {
				t.Logf("%s: %s", role, stage.LastLines(filepath.Join(v.dir, role+".log"), 15))
			}
		}
	})
	v.disks()
	v.boot(m)
	return v
}

// disks makes the guest's disks: its own, with the program and the agent's
// directory, and the one that is protected.
func (v *vm) disks() {
	v.t.Helper()
	root := filepath.Join(v.dir, "root")
	script := fmt.Sprintf("mkdir -p %[1]s && cp -r %[2]s/agent %[2]s/agent.yaml %[1]s && cp %[3]s %[1]s/farside && CGO_ENABLED=0 go build -o %[1]s/load ../load/loader",
		root, v.dir, v.stage.Program)
	for _, cmd := range []*exec.Cmd{
		exec.Command("sh", "-c", script),
		exec.Command("mkfs.ext4", "-q", "-d", root, filepath.Join(v.dir, "state.img"), "400M"),
		exec.Command("mkfs.ext4", "-q", v.disk, fmt.Sprint(vmDisk>>10)),
	} {
		if out, err := cmd.CombinedOutput(); err != nil {
			v.t.Fatalf("%v: %v: %s", cmd.Args[0], err, out)
		}
	}
	os.RemoveAll(root)
}

func (v *vm) boot(m *guest.Machine) {
	v.t.Helper()
	initramfs := filepath.Join(v.dir, "initramfs")
	if err := m.Initramfs(initramfs, vmInit, "virtio_net", "virtio_console"); err != nil {
		v.t.Fatal(err)
	}
	socket := func(name string) (listener net.Listener, path string) {
		path = filepath.Join(v.dir, name)
		listener, err := net.Listen("unix", path)
		if err != nil {
			v.t.Fatal(err)
		}
		v.t.Cleanup(func() { listener.Close() })
		return listener, path
	}
	qmp, qmpPath := socket("qmp.sock")
	shell, shellPath := socket("shell.sock")
	commits, commitsPath := socket("commits.sock")
	cmd := m.Command(context.Background(), "tcg,thread=multi", initramfs, "panic=1", "-m", "768", "-smp", "2",
		"-serial", "file:"+filepath.Join(v.dir, "console"),
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=shell,path="+shellPath, "-device", "virtserialport,nr=1,chardev=shell",
		"-chardev", "socket,id=commits,path="+commitsPath, "-device", "virtserialport,nr=2,chardev=commits",
		"-qmp", "unix:"+qmpPath,
		"-drive", "file="+filepath.Join(v.dir, "state.img")+",format=raw,if=virtio,cache=unsafe",
		"-drive", "file="+v.disk+",format=raw,if=virtio,cache=writeback,discard=unmap",
		"-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n")
	p, err := stage.Start("guest", filepath.Join(v.dir, "qemu.log"), cmd)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() {
		_ = p.Kill() // what is on its disks is no longer of interest
		v.lines.Wait()
	})
	v.qmp, v.shell = accept(v.t, qmp), accept(v.t, shell)
	v.said = bufio.NewReader(v.shell)
	c := accept(v.t, commits)
	v.lines.Go(func() { v.record(c) })
	v.up()
}

func accept(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	if err := l.(*net.UnixListener).SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatalf("QEMU does not connect: %v", err)
	}
	return c
}

// record takes the commits down that the load tells of.
func (v *vm) record(c net.Conn) {
	defer c.Close()
	for sc := bufio.NewScanner(c); sc.Scan(); {
		var row, at int64
		// A line that a reset cut short would have another number of digits.
		if n, _ := fmt.Sscan(sc.Text(), &row, &at); n == 2 && at > 1e18 {
			v.oracle.Record(row, time.Unix(0, at))
		}
	}
}

// up waits until the guest has booted, the n-th time if it was to boot n times.
func (v *vm) up() {
	v.t.Helper()
	before := v.asked
	deadline := time.Now().Add(60 * time.Second)
	for v.asked == before { // the shell may miss what it is told while it boots
		if time.Now().After(deadline) {
			v.t.Fatal("the guest does not boot")
		}
		v.try("true", 2*time.Second)
	}
}

// sh runs a command in the guest and returns what it printed.
func (v *vm) sh(command string) string {
	v.t.Helper()
	out, err := v.try(command, 60*time.Second)
	if err != nil {
		v.t.Fatalf("guest: %s: %v", command, err)
	}
	return out
}

func (v *vm) try(command string, limit time.Duration) (string, error) {
	end := fmt.Sprintf("END%d.%d", v.asked, time.Now().UnixNano())
	if err := v.shell.SetDeadline(time.Now().Add(limit)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintf(v.shell, "%s\necho %s\n", command, end); err != nil {
		return "", err
	}
	var out strings.Builder
	for {
		line, err := v.said.ReadString('\n')
		if err != nil {
			return out.String(), errors.Join(err, errors.New(out.String()))
		}
		line = strings.TrimSpace(line)
		if strings.HasSuffix(line, end) {
			v.asked++
			return out.String(), nil
		}
		out.WriteString(line + "\n")
	}
}

// reset does what the button does.
func (v *vm) reset() {
	v.t.Helper()
	for _, c := range []string{"qmp_capabilities", "system_reset"} {
		if err := json.NewEncoder(v.qmp).Encode(map[string]string{"execute": c}); err != nil {
			v.t.Fatal(err)
		}
	}
}

// load starts the mixed load in the guest.
func (v *vm) load() {
	v.t.Helper()
	v.sh("rm -f /tmp/go; mkfifo /tmp/go; (sleep 10000 > /tmp/go & echo $! > /tmp/sleeper)")
	v.sh("(FARSIDE_LOAD_SLOW=20 FARSIDE_LOAD_DIR=/data /state/load < /tmp/go > $(echo /dev/vport?p2) 2> /tmp/load.err; echo $? > /tmp/load.end) &")
}

// loaded waits for a commit of the load behind row; on a busy machine a load takes a while to begin.
func (v *vm) loaded(row int64) {
	v.t.Helper()
	for until := time.Now().Add(time.Minute); v.oracle.Last() <= row; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(until) {
			v.t.Fatalf("no commit behind row %d", row)
		}
	}
}

// rest ends the load and unmounts the disk: its image holds all that was written.
func (v *vm) rest() {
	v.t.Helper()
	v.sh("kill $(cat /tmp/sleeper); while [ ! -f /tmp/load.end ]; do sleep 0.1; done")
	if out := v.sh("cat /tmp/load.end /tmp/load.err; rm /tmp/load.end"); out != "0\n" {
		v.t.Errorf("the load in the guest ended badly: %s", out)
	}
	v.sh("sync; umount /data; sync")
}

// headEqualsDisk compares the newest state with the disk, which is at rest.
func (v *vm) headEqualsDisk(name string) *farsidev1.TagPoint {
	v.t.Helper()
	tag, err := v.stage.Far.Tag(v.t.Context(), name)
	if err != nil {
		v.t.Fatal(err)
	}
	image, err := os.ReadFile(v.disk)
	if err != nil {
		v.t.Fatal(err)
	}
	v.equal(image, tag, tag)
	return tag
}

// log remembers what the agent said and returns it.
func (v *vm) log() string {
	v.t.Helper()
	v.agentLog = v.sh("cat /state/agent.log")
	return v.agentLog
}

// protected begins the replication of the guest's disk.
func (v *vm) protected() {
	v.t.Helper()
	v.bootID = strings.TrimSpace(v.sh("cat /proc/sys/kernel/random/boot_id"))
	if err := v.stage.Wait(v.t.Context(), time.Minute); err != nil {
		v.t.Fatal(err)
	}
	v.protect("/dev/vdb")
}

// rebooted waits for the guest and for its agent after another boot.
func (v *vm) rebooted() {
	v.t.Helper()
	v.up()
	id := strings.TrimSpace(v.sh("cat /proc/sys/kernel/random/boot_id"))
	if id == v.bootID {
		v.t.Fatal("the guest did not boot again")
	}
	v.bootID = id
	err := stage.Poll(v.t.Context(), time.Minute, "wait for the agent after the boot", func(ctx context.Context) (bool, error) {
		m, err := v.stage.Far.State(ctx)
		return m.GetHost().GetBootId() == id, err
	})
	if err != nil {
		v.t.Fatal(err)
	}
}
