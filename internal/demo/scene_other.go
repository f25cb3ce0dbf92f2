//go:build !linux

package demo

import (
	"context"
	"fmt"
	"io"
	"time"

	"farside/internal/dr"
)

// newDatabase needs loop devices and ext4.
func newDatabase(context.Context, string, int64, int) (scene, error) {
	return nil, fmt.Errorf("make a disk with a file system: %w", dr.ErrUnsupported)
}

// Watchdog thaws frozen file systems, which only Linux has.
func Watchdog(string, time.Duration, io.Reader, io.Writer) error {
	return fmt.Errorf("watch a frozen file system: %w", dr.ErrUnsupported)
}
