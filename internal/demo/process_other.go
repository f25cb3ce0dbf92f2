//go:build !linux

package demo

import (
	"os"
	"os/exec"
)

func dieWithParent(*exec.Cmd) {}

func terminate(p *os.Process) error { return p.Kill() }
