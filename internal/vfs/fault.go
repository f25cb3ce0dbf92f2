package vfs

import (
	"errors"
	"fmt"
	"io"
)

// Op is a call that is about to be made.
type Op struct {
	Kind OpKind
	Name string // of the file or directory
	Off  int64  // reads, writes, holes; the size for Truncate
	Len  int64
}

// OpKind names a method of FS or File.
type OpKind string

// The calls that an Injector sees.
const (
	OpCreate   OpKind = "create"
	OpOpen     OpKind = "open"
	OpOpenFile OpKind = "openfile"
	OpRemove   OpKind = "remove"
	OpRename   OpKind = "rename"
	OpMkdir    OpKind = "mkdir"
	OpSyncDir  OpKind = "syncdir"
	OpList     OpKind = "list"
	OpStat     OpKind = "stat"
	OpLock     OpKind = "lock"
	OpRead     OpKind = "read"
	OpWrite    OpKind = "write"
	OpTruncate OpKind = "truncate"
	OpSync     OpKind = "sync"
	OpSize     OpKind = "size"
	OpPunch    OpKind = "punch"
)

// Changes reports whether the call can change what is stored or what is
// durable.
func (k OpKind) Changes() bool {
	switch k {
	case OpOpen, OpOpenFile, OpList, OpStat, OpLock, OpRead, OpSize:
		return false
	}
	return true
}

// Injector is asked before each call. An error is returned instead of making
// the call; a ShortWrite makes part of a write first. It may be called by
// several goroutines and holds no lock of the file system then, so it may
// also take a Mem's Crash.
type Injector func(Op) error

// ShortWrite is the error with which an Injector lets N bytes through.
type ShortWrite struct {
	N   int64
	Err error // what the caller sees
}

// Error implements error.
func (e *ShortWrite) Error() string { return fmt.Sprintf("short write of %d bytes: %v", e.N, e.Err) }

// Unwrap returns Err.
func (e *ShortWrite) Unwrap() error { return e.Err }

// NewFault returns fsys with inject asked before each call to it or to its
// files. Closing always succeeds or fails by itself.
func NewFault(fsys FS, inject Injector) FS { return &faultFS{fsys, inject} }

type faultFS struct {
	fs     FS
	inject Injector
}

func (x *faultFS) open(kind OpKind, name string, open func(string) (File, error)) (File, error) {
	if err := x.inject(Op{Kind: kind, Name: name}); err != nil {
		return nil, err
	}
	f, err := open(name)
	if err != nil {
		return nil, err
	}
	return &faultFile{f, x.inject, name}, nil
}

func (x *faultFS) Create(name string) (File, error)   { return x.open(OpCreate, name, x.fs.Create) }
func (x *faultFS) Open(name string) (File, error)     { return x.open(OpOpen, name, x.fs.Open) }
func (x *faultFS) OpenFile(name string) (File, error) { return x.open(OpOpenFile, name, x.fs.OpenFile) }

func (x *faultFS) do(kind OpKind, name string, call func(string) error) error {
	if err := x.inject(Op{Kind: kind, Name: name}); err != nil {
		return err
	}
	return call(name)
}

func (x *faultFS) Remove(name string) error    { return x.do(OpRemove, name, x.fs.Remove) }
func (x *faultFS) RemoveAll(name string) error { return x.do(OpRemove, name, x.fs.RemoveAll) }
func (x *faultFS) MkdirAll(dir string) error   { return x.do(OpMkdir, dir, x.fs.MkdirAll) }
func (x *faultFS) SyncDir(dir string) error    { return x.do(OpSyncDir, dir, x.fs.SyncDir) }

func (x *faultFS) Rename(from, to string) error {
	return x.do(OpRename, from, func(string) error { return x.fs.Rename(from, to) })
}

func (x *faultFS) List(dir string) ([]string, error) {
	if err := x.inject(Op{Kind: OpList, Name: dir}); err != nil {
		return nil, err
	}
	return x.fs.List(dir)
}

func (x *faultFS) Stat(name string) (Info, error) {
	if err := x.inject(Op{Kind: OpStat, Name: name}); err != nil {
		return Info{}, err
	}
	return x.fs.Stat(name)
}

func (x *faultFS) Lock(name string) (io.Closer, error) {
	if err := x.inject(Op{Kind: OpLock, Name: name}); err != nil {
		return nil, err
	}
	return x.fs.Lock(name)
}

type faultFile struct {
	File
	inject Injector
	name   string
}

func (f *faultFile) ask(kind OpKind, off, n int64) error {
	return f.inject(Op{Kind: kind, Name: f.name, Off: off, Len: n})
}

func (f *faultFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.ask(OpRead, off, int64(len(p))); err != nil {
		return 0, err
	}
	return f.File.ReadAt(p, off)
}

func (f *faultFile) WriteAt(p []byte, off int64) (int, error) {
	err := f.ask(OpWrite, off, int64(len(p)))
	if short := (*ShortWrite)(nil); errors.As(err, &short) {
		n, werr := f.File.WriteAt(p[:min(max(short.N, 0), int64(len(p)))], off)
		return n, errors.Join(short.Err, werr)
	}
	if err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

func (f *faultFile) Truncate(size int64) error {
	if err := f.ask(OpTruncate, size, 0); err != nil {
		return err
	}
	return f.File.Truncate(size)
}

func (f *faultFile) Sync() error {
	if err := f.ask(OpSync, 0, 0); err != nil {
		return err
	}
	return f.File.Sync()
}

func (f *faultFile) Size() (int64, error) {
	if err := f.ask(OpSize, 0, 0); err != nil {
		return 0, err
	}
	return f.File.Size()
}

// PunchHole implements HolePuncher.
func (f *faultFile) PunchHole(off, n int64) error {
	if err := f.ask(OpPunch, off, n); err != nil {
		return err
	}
	return PunchHole(f.File, off, n)
}

// NextData implements DataSeeker.
func (f *faultFile) NextData(off int64) (start, end int64, err error) {
	if err := f.ask(OpRead, off, 0); err != nil {
		return 0, 0, err
	}
	return NextData(f.File, off)
}
