package vfs

import (
	"io"
	"os"
	"slices"
)

// OS returns the file system of the operating system.
func OS() FS { return osFS{} }

type osFS struct{}

// osFile adds what os.File lacks; the rest of its abilities depend on the platform.
type osFile struct{ *os.File }

func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func wrapOS(f *os.File, err error) (File, error) {
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFS) Create(name string) (File, error) {
	return wrapOS(os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600))
}
func (osFS) Open(name string) (File, error)     { return wrapOS(os.Open(name)) }
func (osFS) OpenFile(name string) (File, error) { return wrapOS(os.OpenFile(name, os.O_RDWR, 0)) }
func (osFS) Remove(name string) error           { return os.Remove(name) }
func (osFS) RemoveAll(name string) error        { return os.RemoveAll(name) }
func (osFS) Rename(from, to string) error       { return os.Rename(from, to) }
func (osFS) MkdirAll(dir string) error          { return os.MkdirAll(dir, 0o700) }
func (osFS) SyncDir(dir string) error           { return syncDir(dir) }
func (osFS) Lock(name string) (io.Closer, error) {
	return lockFile(name)
}

func (osFS) List(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	slices.Sort(names)
	return names, nil
}

func (osFS) Stat(name string) (Info, error) {
	info, err := os.Stat(name)
	if err != nil {
		return Info{}, err
	}
	if info.IsDir() {
		return Info{Dir: true}, nil
	}
	return Info{Size: info.Size()}, nil
}
