//go:build !linux

package quiesce

import (
	"context"
	"fmt"
	"syscall"

	"farside/internal/dr"
)

// Prepare is only possible on Linux: the error wraps dr.ErrUnsupported.
func Prepare(context.Context, Options) (*Session, error) {
	return nil, fmt.Errorf("freeze file systems: %w", dr.ErrUnsupported)
}

// RunWatchdog is only possible on Linux: the error wraps dr.ErrUnsupported.
func RunWatchdog() error {
	return fmt.Errorf("run watchdog: %w", dr.ErrUnsupported)
}

func ownSession() *syscall.SysProcAttr { return nil }

// LockProgram is only possible on Linux: the error wraps dr.ErrUnsupported.
func LockProgram() (int64, error) {
	return 0, fmt.Errorf("lock program: %w", dr.ErrUnsupported)
}

func thawMount(ledgerEntry) bool { return false }
