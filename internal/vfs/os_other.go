//go:build !linux

package vfs

import (
	"fmt"
	"io"
	"os"
)

// syncDir does nothing: where there is no fsync of a directory, the file
// system orders the change of a name behind the file's own sync.
func syncDir(string) error { return nil }

// lockFile makes the file exclusively and removes it when it is closed. After a
// crash the file stays and must be removed by hand; the error says so.
func lockFile(name string) (io.Closer, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s (remove the file if no other process runs): %w", name, err)
	}
	return lock{f, name}, nil
}

type lock struct {
	*os.File
	name string
}

func (l lock) Close() error {
	if err := l.File.Close(); err != nil {
		return err
	}
	return os.Remove(l.name)
}
