package stage

import (
	"os"
	"os/exec"
	"syscall"
)

// dieWithParent lets the kernel kill cmd when the demo is killed, and keeps an interrupt from the terminal away
// from it: the demo ends its processes in order.
func dieWithParent(cmd *exec.Cmd) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig, cmd.SysProcAttr.Setpgid = syscall.SIGKILL, true
}

// Terminate asks a process to end.
func Terminate(p *os.Process) error { return p.Signal(syscall.SIGTERM) }
