//go:build linux && amd64

package ebpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"farside/internal/dr"
)

// pinDir is the directory in which one capture survives. It belongs to the process
// that has it locked; the lock ends with the process. Its subdirectories, each
// of which holds the pins of one set of programs and maps, tell where a
// process stood when it was killed:
//
//	live new old
//	  -   -   -   nothing survives
//	  x   -   -   a capture to adopt
//	  -   x   -   opening was cut short: new is of no use
//	  x   x   -   replacing was cut short while new was made: new is of no use
//	  -   x   x   replacing was cut short behind the point where new was whole: it is live
//	  x   -   x   replacing was cut short at the removal of old
//	  -   -   x   removing was cut short
//
// Each step from one line to the next is one rename or the removal of one
// directory. recover leads from every line to one of the first two.
type pinDir struct {
	path string
	lock int // descriptor of the directory
}

const (
	pinLive = "live"
	pinNew  = "new"
	pinOld  = "old"
	// pinMemory is Survivor.Memory, which outlives the captures.
	pinMemory = "memory"
	// pinLink begins the names of what makes the programs run.
	pinLink = "link-"
)

// lockPins makes path if need be, locks it and brings it into order.
func lockPins(path string) (*pinDir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("make pin directory: %w", kindOf(err))
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open pin directory %s: %w", path, kindOf(err))
	}
	p := &pinDir{path: path, lock: fd}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		p.unlock()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("pin directory %s: another process captures: %w", path, dr.ErrExists)
		}
		return nil, fmt.Errorf("lock pin directory %s: %w", path, err)
	}
	if err := p.recover(); err != nil {
		p.unlock()
		return nil, err
	}
	return p, nil
}

func (p *pinDir) unlock() { _ = unix.Close(p.lock) } // nothing was written through it

func (p *pinDir) in(name ...string) string {
	return filepath.Join(append([]string{p.path}, name...)...)
}

func (p *pinDir) has(name string) bool { return exists(p.in(name)) }

// recover cleans up behind a process that was killed.
func (p *pinDir) recover() error {
	if p.has(pinNew) {
		if p.has(pinLive) || !p.has(pinOld) {
			if err := p.remove(pinNew); err != nil {
				return err
			}
		} else if err := p.rename(pinNew, pinLive); err != nil {
			return err
		}
	}
	return p.remove(pinOld)
}

// begin makes an empty new.
func (p *pinDir) begin() error {
	if err := os.Mkdir(p.in(pinNew), 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", err)
	}
	return nil
}

// commit puts new in the place of live.
func (p *pinDir) commit() error {
	if p.has(pinLive) {
		if err := p.rename(pinLive, pinOld); err != nil {
			return err
		}
	}
	if err := p.rename(pinNew, pinLive); err != nil {
		return err
	}
	return p.remove(pinOld)
}

// clear removes everything that is pinned, and the directory itself if it can.
func (p *pinDir) clear() error {
	if p.has(pinLive) {
		if err := p.rename(pinLive, pinOld); err != nil {
			return err
		}
	}
	if err := errors.Join(p.remove(pinNew), p.remove(pinOld)); err != nil {
		return err
	}
	if err := os.Remove(p.in(pinMemory)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin: %w", err)
	}
	_ = os.Remove(p.path) // somebody else's files may be in it
	return nil
}

func (p *pinDir) rename(from, to string) error {
	if err := os.Rename(p.in(from), p.in(to)); err != nil {
		return fmt.Errorf("rename pins: %w", err)
	}
	return nil
}

// remove takes the pins of a subdirectory away, those that make programs run
// first: what they need is there until they have ended.
func (p *pinDir) remove(name string) error {
	entries, err := os.ReadDir(p.in(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	for _, links := range []bool{true, false} {
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), pinLink) != links {
				continue
			}
			if err := os.Remove(p.in(name, e.Name())); err != nil {
				return fmt.Errorf("remove pin: %w", err)
			}
		}
	}
	if err := os.Remove(p.in(name)); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}

// Remove takes away what is pinned at a directory (Options.Pin), with the directory: for what is
// captured no longer, also when its disks are gone. It does nothing if there is nothing. The
// error wraps dr.ErrExists while a process captures.
func Remove(dir string) error {
	if !exists(dir) {
		return nil
	}
	p, err := lockPins(dir)
	if err != nil {
		return err
	}
	defer p.unlock()
	return p.clear()
}

// MountFileSystem makes sure that a file system for BPF objects is at dir,
// usually FileSystem. It does nothing if there is one. The mount stays when the process ends.
func MountFileSystem(dir string) error {
	switch is, err := isBPF(dir); {
	case err != nil:
		return err
	case is:
		return nil
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount BPF file system at %s: %w", dir, kindOf(err))
	}
	return nil
}

// isBPF reports whether dir is on a file system for BPF objects.
func isBPF(dir string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, fmt.Errorf("look at %s: %w", dir, kindOf(err))
	}
	return st.Type == unix.BPF_FS_MAGIC, nil
}
