//go:build linux && amd64

package ebpf

import (
	"testing"

	"farside/internal/capture/capturetest"
)

func TestConformance(t *testing.T) { capturetest.Run(t, newTarget) }
