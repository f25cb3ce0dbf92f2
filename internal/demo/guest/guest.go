// Package guest boots a small Linux machine from a disk that is served over NBD and
// returns what it said about the disk's content.
//
// The machine is QEMU with a kernel of the distribution and an initramfs made here: busybox, the
// modules for a virtio disk, and an init that mounts the disk, prints a marker and sums of what it
// holds, and powers off. Find looks for the parts; Machine.Boot runs one guest.
//
// It doesn't install anything, needs no root, and never writes to the disk but through the
// guest's file system (the replay of a journal). A Machine is immutable; Boot may run several times at once.
package guest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"farside/internal/dr"
)

// Marker is the line that the guest prints once it has read the disk.
const Marker = "FARSIDE-REPLICA-READ"

// Machine is all that is needed to boot a guest.
type Machine struct {
	qemu, busybox string
	kernel        string // the image
	modules       string // lib/modules/VERSION
}

// Find looks for QEMU, busybox and a kernel. The kernel is looked for below each of roots, as
// boot/vmlinuz-VERSION with lib/modules/VERSION. The error says what is missing and wraps dr.ErrUnsupported.
func Find(roots ...string) (*Machine, error) {
	m := &Machine{}
	var err error
	if m.qemu, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		return nil, fmt.Errorf("boot a guest: qemu-system-x86_64 is not installed: %w", dr.ErrUnsupported)
	}
	if m.busybox, err = exec.LookPath("busybox"); err != nil {
		return nil, fmt.Errorf("boot a guest: busybox is not installed: %w", dr.ErrUnsupported)
	}
	if dynamic, err := isDynamic(m.busybox); err != nil || dynamic {
		return nil, fmt.Errorf("boot a guest: %s is not the static busybox (package busybox-static): %w", m.busybox, dr.ErrUnsupported)
	}
	for _, root := range roots {
		if m.findKernel(root) {
			return m, nil
		}
	}
	return nil, fmt.Errorf("boot a guest: no readable kernel with its modules below %s: %w", strings.Join(roots, ", "), dr.ErrUnsupported)
}

func (m *Machine) findKernel(root string) bool {
	images, _ := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*")) // only a bad pattern is an error
	for i := len(images) - 1; i >= 0; i-- {
		f, err := os.Open(images[i])
		if err != nil {
			continue // Ubuntu keeps kernels from all but root
		}
		f.Close()
		version := strings.TrimPrefix(filepath.Base(images[i]), "vmlinuz-")
		for _, lib := range []string{"lib", "usr/lib"} {
			dir := filepath.Join(root, lib, "modules", version)
			if _, err := os.Stat(filepath.Join(dir, "modules.builtin")); err == nil {
				m.kernel, m.modules = images[i], dir
				return true
			}
		}
	}
	return false
}

// Task says what the guest shall read.
type Task struct {
	// Disk is where QEMU finds the disk: an NBD URI (nbd:// or nbd+unix://) or a file name of a raw image.
	Disk string
	// Sum is how many bytes from the disk's beginning to sum up; 0: mount it as ext4 and sum each file of its root.
	Sum int64
	// Accel is QEMU's accelerator, "tcg" or "kvm".
	Accel string
	// Dir is a directory for the initramfs; it is left there.
	Dir string
}

// Report is what a guest said.
type Report struct {
	Marker bool              // it got to the end
	Sums   map[string]string // SHA-256 in hex, by file name; "disk" for Task.Sum
	Took   time.Duration     // from starting QEMU to its end
	Log    string            // the last of the serial console, for when it failed
}

// Boot runs a guest to its end. A guest that doesn't get to the marker is not an error; a guest that can't be
// started is.
func (m *Machine) Boot(ctx context.Context, task Task) (Report, error) {
	initramfs := filepath.Join(task.Dir, "initramfs")
	if err := m.Initramfs(initramfs, initScript); err != nil {
		return Report{}, fmt.Errorf("boot a guest: %w", err)
	}
	args := []string{"-m", "256", "-no-reboot", "-serial", "stdio"}
	if task.Disk != "" {
		args = append(args, "-drive", "file="+strings.ReplaceAll(task.Disk, ",", ",,")+",format=raw,if=virtio,cache=none,discard=unmap")
	}
	cmd := m.Command(ctx, task.Accel, initramfs, fmt.Sprintf("panic=-1 farside.sum=%d", task.Sum), args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		return Report{}, fmt.Errorf("boot a guest: %w", err)
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return Report{}, fmt.Errorf("boot a guest: %w", err)
	}
	report := listen(out)
	err = cmd.Wait()
	report.Took = time.Since(start)
	if ctx.Err() != nil {
		return report, fmt.Errorf("boot a guest: %w", errors.Join(context.Cause(ctx), err))
	}
	if err != nil {
		return report, fmt.Errorf("boot a guest: %s: %w", strings.TrimSpace(errs.String()), err)
	}
	return report, nil
}

// Command returns the command line of a guest without any device but its processor: with an accelerator, an
// initramfs, further words for the kernel, and further arguments of QEMU. It dies with the caller.
func (m *Machine) Command(ctx context.Context, accel, initramfs, words string, args ...string) *exec.Cmd {
	// Without no_timer_check the kernel tests its timer against the clock of an emulated processor, and gives up if that
	// is starved of time.
	cmd := exec.CommandContext(ctx, m.qemu, append([]string{
		"-nodefaults", "-no-user-config", "-accel", accel, "-display", "none", "-monitor", "none",
		"-kernel", m.kernel, "-initrd", initramfs, "-append", "console=ttyS0 quiet no_timer_check " + words,
	}, args...)...)
	cmd.WaitDelay = 5 * time.Second
	dieWithParent(cmd)
	return cmd
}

// listen reads the serial console to its end.
func listen(r io.Reader) Report {
	report := Report{Sums: map[string]string{}}
	var tail []string
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		line := strings.TrimSpace(sc.Text())
		if tail = append(tail, line); len(tail) > 20 {
			tail = tail[1:]
		}
		switch f := strings.Fields(line); {
		case line == Marker:
			report.Marker = true
		case len(f) == 3 && f[0] == "FARSIDE-SUM" && len(f[1]) == 64:
			report.Sums[f[2]] = f[1]
		}
	}
	_, _ = io.Copy(io.Discard, r) // a line too long ends the scan; QEMU must not block on the pipe
	report.Log = strings.Join(tail, "\n")
	return report
}

// Accel returns "kvm" if a guest really runs to its end with it, else "tcg". That /dev/kvm exists proves nothing.
func (m *Machine) Accel(ctx context.Context, dir string) string {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "tcg"
	}
	f.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	report, err := m.Boot(ctx, Task{Sum: -1, Accel: "kvm", Dir: dir})
	if err != nil || !report.Marker {
		return "tcg"
	}
	return "kvm"
}
