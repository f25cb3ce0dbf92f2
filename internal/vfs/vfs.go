// Package vfs is the file system as Farside's storage needs it: files read and
// written at offsets, and every step of making them durable explicit. All
// stored data goes through it, so that tests can crash and fail it at each call.
//
// There are three implementations: OS (the operating system's), Mem (in memory;
// Crash gives what a power cut would leave) and NewFault (injects errors around
// any other). All are safe for concurrent use, and so are their files.
//
// It is not a general file system: no permissions, links, times or appending.
// Names are slash-separated paths. Errors satisfy errors.Is with the kinds of
// io/fs (ErrNotExist, ErrExist).
package vfs

import (
	"fmt"
	"io"
	"path"
)

// FS is a file system.
//
// A file's content is durable after File.Sync; its name (creation, renaming,
// removal) after SyncDir of its directory.
type FS interface {
	// Create opens a new or emptied file for reading and writing.
	Create(name string) (File, error)
	// Open opens an existing file for reading.
	Open(name string) (File, error)
	// OpenFile opens an existing file for reading and writing.
	OpenFile(name string) (File, error)
	// Remove removes a file or an empty directory.
	Remove(name string) error
	// RemoveAll removes name and everything below it, if it is there.
	RemoveAll(name string) error
	// Rename replaces newname, if it is a file. Within one directory that is
	// atomic also under a power cut.
	Rename(oldname, newname string) error
	// MkdirAll makes a directory and those above it.
	MkdirAll(dir string) error
	// SyncDir makes the entries of dir durable.
	SyncDir(dir string) error
	// List returns the sorted base names of the entries of dir.
	List(dir string) ([]string, error)
	// Stat describes a file or directory.
	Stat(name string) (Info, error)
	// Lock takes the exclusive lock that the file name stands for, until it is
	// closed or the process ends. It does not wait: a held lock is an error.
	Lock(name string) (io.Closer, error)
}

// File is an open file.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Truncate sets the size in bytes; what it adds reads as zeroes.
	Truncate(size int64) error
	// Sync makes content and size durable.
	Sync() error
	// Size returns the size in bytes.
	Size() (int64, error)
}

// Info describes a file or directory.
type Info struct {
	Size int64 // bytes; 0 for a directory
	Dir  bool
}

// HolePuncher is the ability of a File to give back the space of a range, which
// then reads as zeroes. The size stays.
type HolePuncher interface {
	PunchHole(off, n int64) error
}

// DataSeeker is the ability of a File to tell data from holes. NextData returns
// the first range at or after off that may hold something else than zeroes,
// and io.EOF when there is none.
type DataSeeker interface {
	NextData(off int64) (start, end int64, err error)
}

// AllocatedSizer is the ability of a File to tell how many bytes it occupies.
type AllocatedSizer interface {
	AllocatedBytes() (int64, error)
}

// SpaceTeller is the ability of an FS to tell how much space it has, in bytes.
type SpaceTeller interface {
	Space(dir string) (total, free int64, err error)
}

// Space returns the bytes of the file system that holds dir, and those that
// are free for files; zeroes if that is not known.
func Space(fsys FS, dir string) (total, free int64) {
	if t, ok := fsys.(SpaceTeller); ok {
		if total, free, err := t.Space(dir); err == nil {
			return total, free
		}
	}
	return 0, 0
}

// PunchHole makes [off, off+n) of f read as zeroes: by its own ability, or by
// writing them. The range must lie within the file.
func PunchHole(f File, off, n int64) error {
	if p, ok := f.(HolePuncher); ok {
		return p.PunchHole(off, n)
	}
	zeros := make([]byte, min(n, 1<<20))
	for n > 0 {
		part := zeros[:min(n, int64(len(zeros)))]
		if _, err := f.WriteAt(part, off); err != nil {
			return fmt.Errorf("punch hole: %w", err)
		}
		off += int64(len(part))
		n -= int64(len(part))
	}
	return nil
}

// NextData is f's own answer if it can seek data, else everything up to its
// end is data.
func NextData(f File, off int64) (start, end int64, err error) {
	if s, ok := f.(DataSeeker); ok {
		return s.NextData(off)
	}
	size, err := f.Size()
	if err != nil {
		return 0, 0, err
	}
	if off >= size {
		return 0, 0, io.EOF
	}
	return off, size, nil
}

// ReplaceFile makes name hold exactly data, or what it held before, whatever
// happens: it writes name+".new", syncs, renames, and syncs dir, the directory
// of name.
func ReplaceFile(fsys FS, dir, name string, data []byte) error {
	temp := name + ".new"
	f, err := fsys.Create(temp)
	if err != nil {
		return fmt.Errorf("replace %s: %w", name, err)
	}
	if _, err = f.WriteAt(data, 0); err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = fsys.Rename(temp, name)
	}
	if err == nil {
		err = fsys.SyncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("replace %s: %w", name, err)
	}
	return nil
}

// ReadFile returns the content of a file of at most limit bytes.
func ReadFile(fsys FS, name string, limit int64) ([]byte, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, fmt.Errorf("read %s: %d bytes, at most %d expected", name, size, limit)
	}
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return b, nil
}

// MakeDir makes dir and the directories above it that are missing, so that a power cut can't
// take them away any more.
func MakeDir(fsys FS, dir string) error {
	var made []string // and where dir is: whoever made that may have been ended before he synced
	for d := dir; ; d = path.Dir(d) {
		parent := path.Dir(d)
		made = append(made, parent)
		if _, err := fsys.Stat(parent); err == nil || parent == d {
			break
		}
	}
	if err := fsys.MkdirAll(dir); err != nil {
		return err
	}
	for _, d := range made {
		if err := fsys.SyncDir(d); err != nil {
			return err
		}
	}
	return nil
}
