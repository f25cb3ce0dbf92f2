package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"farside/internal/demo/stage"
)

// isolated marks the process that runs in a mount namespace of its own.
const isolated = "FARSIDE_DEMO_ISOLATED"

// Isolate runs this program again with the same arguments in a mount namespace of its own, so that whatever
// becomes of the demo, its mounts go with it. The process that does that passes signals on and returns the exit code.
// It returns done=false where the caller is to go on itself: in that second process, and where there are no rights.
func Isolate(ctx context.Context, out, errs *os.File) (code int, done bool, err error) {
	if os.Getenv(isolated) != "" || os.Getuid() != 0 {
		return 0, false, nil
	}
	self, err := os.Executable()
	if err != nil {
		return 0, false, fmt.Errorf("isolate the demo: %w", err)
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), isolated+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, out, errs
	// Its own process group: an interrupt from the terminal reaches it once, through us.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		if errors.Is(err, syscall.EPERM) { // root without its capabilities
			return 0, false, nil
		}
		return 0, false, fmt.Errorf("isolate the demo: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err = <-ended:
	case <-ctx.Done():
		_ = stage.Terminate(cmd.Process) // it may have ended already
		err = <-ended
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1), true, nil
	}
	return 0, true, err
}

// cannotCapture says why this process can't use eBPF and mount file systems, or is "".
func cannotCapture() string {
	if os.Getuid() != 0 {
		return "not root"
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		return "the kernel has no BTF"
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		return "no loop devices"
	}
	if _, err := lookTool("mkfs.ext4"); err != nil {
		return "mkfs.ext4 is not installed"
	}
	if b, err := os.ReadFile("/sys/kernel/security/lockdown"); err == nil && strings.Contains(string(b), "[confidentiality]") {
		return "the kernel is locked down for confidentiality"
	}
	return ""
}
