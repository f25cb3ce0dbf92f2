package vault

import (
	"io"
	"io/fs"
	"path"
	"sync"
	"sync/atomic"
	"time"

	pebblevfs "github.com/cockroachdb/pebble/v2/vfs"

	"farside/internal/dr"
	"farside/internal/vfs"
)

// indexFS lets Pebble keep its files in a vfs.FS, so that crashes and faults
// in tests reach the index too.
//
// It stops at the first write that fails. Pebble means its process to end when
// its manifest can't be written; if it went on, a later write that succeeds
// could leave tables that contradict each other.
type indexFS struct {
	fs   vfs.FS
	stop *failStop
}

// stoppedPause keeps Pebble, which tries again at once what failed in the background, from using
// up a processor until the vault is closed.
const stoppedPause = 20 * time.Millisecond

// failStop lets writes through until one has failed; that error is the answer to all that follow, after
// a pause.
type failStop struct{ err atomic.Pointer[error] }

func (s *failStop) do(write func() error) error {
	if err := s.err.Load(); err != nil {
		time.Sleep(stoppedPause)
		return *err
	}
	err := write()
	if err != nil {
		s.err.CompareAndSwap(nil, &err)
	}
	return err
}

var _ pebblevfs.FS = indexFS{}

func (x indexFS) Create(name string, _ pebblevfs.DiskWriteCategory) (pebblevfs.File, error) {
	var f vfs.File
	err := x.stop.do(func() (err error) {
		f, err = x.fs.Create(name)
		return err
	})
	return x.wrap(f, name, err)
}

func (x indexFS) Open(name string, _ ...pebblevfs.OpenOption) (pebblevfs.File, error) {
	f, err := x.fs.Open(name)
	return x.wrap(f, name, err)
}

func (x indexFS) OpenReadWrite(name string, c pebblevfs.DiskWriteCategory, _ ...pebblevfs.OpenOption) (pebblevfs.File, error) {
	f, err := x.fs.OpenFile(name)
	if err != nil {
		return x.Create(name, c)
	}
	return x.wrap(f, name, nil)
}

func (x indexFS) OpenDir(name string) (pebblevfs.File, error) {
	return &indexFile{name: name, stop: x.stop, syncDir: func() error { return x.fs.SyncDir(name) }}, nil
}

func (x indexFS) ReuseForWrite(oldname, newname string, c pebblevfs.DiskWriteCategory) (pebblevfs.File, error) {
	if err := x.fs.Remove(oldname); err != nil {
		return nil, err
	}
	return x.Create(newname, c)
}

func (x indexFS) Link(_, _ string) error      { return dr.ErrUnsupported } // only for checkpoints
func (x indexFS) Remove(name string) error    { return x.fs.Remove(name) }
func (x indexFS) RemoveAll(name string) error { return x.fs.RemoveAll(name) }
func (x indexFS) Rename(oldname, newname string) error {
	return x.stop.do(func() error { return x.fs.Rename(oldname, newname) })
}
func (x indexFS) Lock(name string) (io.Closer, error) { return x.fs.Lock(name) }
func (x indexFS) List(dir string) ([]string, error)   { return x.fs.List(dir) }
func (x indexFS) PathBase(p string) string            { return path.Base(p) }
func (x indexFS) PathJoin(elem ...string) string      { return path.Join(elem...) }
func (x indexFS) PathDir(p string) string             { return path.Dir(p) }
func (x indexFS) Unwrap() pebblevfs.FS                { return nil }

func (x indexFS) MkdirAll(dir string, _ fs.FileMode) error { return x.fs.MkdirAll(dir) }

func (x indexFS) Stat(name string) (pebblevfs.FileInfo, error) {
	i, err := x.fs.Stat(name)
	if err != nil {
		return nil, err
	}
	return indexInfo{path.Base(name), i}, nil
}

func (x indexFS) GetDiskUsage(string) (pebblevfs.DiskUsage, error) {
	return pebblevfs.DiskUsage{}, pebblevfs.ErrUnsupported
}

// indexFile is a vfs.File with the sequential side that Pebble wants, or a
// directory that can only be synced.
type indexFile struct {
	vfs.File
	name    string
	stop    *failStop
	syncDir func() error
	mu      struct {
		sync.Mutex
		read, write int64
	}
}

func (x indexFS) wrap(f vfs.File, name string, err error) (pebblevfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &indexFile{File: f, name: name, stop: x.stop}, nil
}

func (f *indexFile) Read(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.ReadAt(p, f.mu.read)
	f.mu.read += int64(n)
	return n, err
}

func (f *indexFile) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	err := f.stop.do(func() (err error) {
		n, err = f.WriteAt(p, f.mu.write)
		return err
	})
	f.mu.write += int64(n)
	return n, err
}

func (f *indexFile) Close() error {
	if f.syncDir != nil {
		return nil
	}
	return f.File.Close()
}

func (f *indexFile) Sync() error {
	if f.syncDir != nil {
		return f.stop.do(f.syncDir)
	}
	return f.stop.do(f.File.Sync)
}

func (f *indexFile) SyncData() error              { return f.Sync() }
func (f *indexFile) SyncTo(int64) (bool, error)   { return false, nil } // a hint only
func (f *indexFile) Preallocate(_, _ int64) error { return nil }
func (f *indexFile) Prefetch(_, _ int64) error    { return nil }
func (f *indexFile) Fd() uintptr                  { return pebblevfs.InvalidFd }

func (f *indexFile) Stat() (pebblevfs.FileInfo, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	return indexInfo{path.Base(f.name), vfs.Info{Size: size}}, nil
}

// indexInfo is the little of fs.FileInfo that Pebble looks at.
type indexInfo struct {
	name string
	info vfs.Info
}

func (i indexInfo) Name() string                 { return i.name }
func (i indexInfo) Size() int64                  { return i.info.Size }
func (i indexInfo) IsDir() bool                  { return i.info.Dir }
func (i indexInfo) ModTime() time.Time           { return time.Time{} }
func (i indexInfo) Sys() any                     { return nil }
func (i indexInfo) DeviceID() pebblevfs.DeviceID { return pebblevfs.DeviceID{} }

func (i indexInfo) Mode() fs.FileMode {
	if i.info.Dir {
		return fs.ModeDir | 0o755
	}
	return 0o644
}
