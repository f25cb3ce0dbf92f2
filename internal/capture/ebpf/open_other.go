//go:build !(linux && amd64)

package ebpf

import (
	"fmt"
	"runtime"

	"farside/internal/capture"
	"farside/internal/dr"
)

// Open answers dr.ErrUnsupported: the programs need Linux on x86-64.
func Open(disks []capture.Disk, o Options) (capture.Source, error) {
	if _, err := o.withDefaults(0, 0); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("capture %d disks by eBPF on %s/%s: needs linux/amd64: %w",
		len(disks), runtime.GOOS, runtime.GOARCH, dr.ErrUnsupported)
}

// MountFileSystem answers dr.ErrUnsupported.
func MountFileSystem(dir string) error {
	return fmt.Errorf("mount BPF file system at %s: needs linux/amd64: %w", dir, dr.ErrUnsupported)
}

// Remove does nothing: nothing can be pinned here.
func Remove(string) error { return nil }
