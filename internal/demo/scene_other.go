//go:build !linux

package demo

import (
	"context"
	"fmt"

	"farside/internal/dr"
)

// newDatabase needs loop devices and ext4.
func newDatabase(context.Context, string, int64, int) (scene, error) {
	return nil, fmt.Errorf("make a disk with a file system: %w", dr.ErrUnsupported)
}
