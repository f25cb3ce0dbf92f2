//go:build !unix

package quiesce

import (
	"context"
	"fmt"
	"io/fs"
	"time"

	"farside/internal/dr"
)

func ownerOf(fs.FileInfo) (uint32, bool) { return 0, false }

func execute(context.Context, string, string, []string, time.Duration) ([]byte, error) {
	return nil, fmt.Errorf("run hooks: %w", dr.ErrUnsupported)
}
