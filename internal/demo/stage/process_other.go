//go:build !linux

package stage

import (
	"os"
	"os/exec"
)

func dieWithParent(*exec.Cmd) {}

// Terminate asks a process to end.
func Terminate(p *os.Process) error { return p.Kill() }
