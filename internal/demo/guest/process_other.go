//go:build !linux

package guest

import "os/exec"

func dieWithParent(*exec.Cmd) {}
