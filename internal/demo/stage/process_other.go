//go:build !linux

package stage

import (
	"os"
	"os/exec"
)

func dieWithParent(*exec.Cmd) {}

func Terminate(p *os.Process) error { return p.Kill() }
