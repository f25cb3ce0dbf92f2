package guest

import (
	"os/exec"
	"syscall"
)

// dieWithParent asks the kernel to kill cmd when the thread that starts it ends, so that a killed demo leaves
// no QEMU behind, and keeps an interrupt from the terminal away from it: the context ends it.
func dieWithParent(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
}
