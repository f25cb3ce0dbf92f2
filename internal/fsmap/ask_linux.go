package fsmap

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"farside/internal/dr"
	"farside/internal/extent"
)

// getFSMap is FS_IOC_GETFSMAP, linux/include/uapi/linux/fsmap.h.
const getFSMap = 0xC0C0583B

// maxReplies bounds the answers of one file system: with 1,024 records each, more than a file
// system of 16 TB has that is fragmented to the last block of 256 KiB.
const maxReplies = 64 << 10

// ask asks the kernel about a volume, at the first of its mounts that will do.
func ask(v *volume) ([]extent.Range, error) {
	var errs []error
	for _, m := range v.mounts {
		free, err := askAt(v, m)
		if err == nil {
			v.Mount = m
			return free, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

func askAt(v *volume, mount string) ([]extent.Range, error) {
	f, err := openOn(v, mount)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := writable(f, v); err != nil {
		return nil, err
	}
	free, err := readMap(f, v)
	if err != nil {
		return nil, fmt.Errorf("ask %s what is free: %w", mount, err)
	}
	// What was freed in memory only is in use yet for whoever finds the disk as it is now.
	if !v.unsynced {
		if err := unix.Syncfs(int(f.Fd())); err != nil {
			return nil, fmt.Errorf("sync %s: %w", mount, err)
		}
	}
	// A file system that has failed meanwhile may have synced nothing and said nothing.
	if err := writable(f, v); err != nil {
		return nil, err
	}
	again, err := openOn(v, mount)
	if err != nil {
		return nil, err
	}
	return free, again.Close()
}

// openOn opens a mount point if the volume is mounted there.
func openOn(v *volume, mount string) (*os.File, error) {
	if err := onVolume(v, mount, unix.Stat); err != nil {
		return nil, err
	}
	fd, err := unix.Open(mount, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", mount, err)
	}
	err = onVolume(v, mount, func(_ string, st *unix.Stat_t) error { return unix.Fstat(fd, st) })
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), mount), nil
}

// onVolume checks that something is a directory or file of the volume: another file system may
// be mounted over it.
func onVolume(v *volume, mount string, stat func(string, *unix.Stat_t) error) error {
	var st unix.Stat_t
	if err := stat(mount, &st); err != nil {
		return fmt.Errorf("look at %s: %w", mount, err)
	}
	if dev := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)); dev != v.dev {
		return fmt.Errorf("%s is on device %s, not %s: %w", mount, dev, v.dev, dr.ErrNotFound)
	}
	if mode := st.Mode & unix.S_IFMT; mode != unix.S_IFDIR && mode != unix.S_IFREG {
		return fmt.Errorf("%s is neither a directory nor a file: %w", mount, dr.ErrUnsupported)
	}
	return nil
}

// writable checks that the file system is of the kind and takes writes: one that can't be written may know
// more, or less, than what somebody finds who recovers its journal.
func writable(f *os.File, v *volume) error {
	k := v.Kind
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("look at %s: %w", f.Name(), err)
	}
	want := map[Kind]int64{Ext4: unix.EXT4_SUPER_MAGIC, XFS: unix.XFS_SUPER_MAGIC}[k]
	if int64(st.Type) != want {
		return fmt.Errorf("%s is not %s: %w", f.Name(), k, dr.ErrUnsupported)
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return fmt.Errorf("%s is read-only: %w", f.Name(), dr.ErrUnsupported)
	}
	if k == Ext4 {
		return unharmed(v)
	}
	return nil
}

// unharmed refuses an ext4 that has met errors: told to go on regardless, it may have given up its
// journal, and kernels before 5.17 don't say so when they sync. (An xfs that gave up can't be opened.)
func unharmed(v *volume) error {
	name := "/sys/fs/ext4/" + path.Base(v.Device) + "/errors_count"
	b, err := os.ReadFile(name)
	if err != nil {
		return fmt.Errorf("look for errors of %s: %w", v.Device, err)
	}
	if n := strings.TrimSpace(string(b)); n != "0" {
		return fmt.Errorf("%s has met %s errors: %w", v.Device, n, dr.ErrUnsupported)
	}
	return nil
}

func readMap(f *os.File, v *volume) ([]extent.Range, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	g := gatherer{dev: uint32(st.Dev), size: v.size, limit: MaxRanges, least: Grain}
	b := newQuestion()
	for range maxReplies {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), getFSMap, uintptr(unsafe.Pointer(&b[0]))); errno != 0 {
			return nil, errno
		}
		records, err := parseReply(b)
		if err != nil {
			return nil, err
		}
		for _, r := range records {
			if err := g.add(r); err != nil {
				return nil, err
			}
		}
		if !goOn(b) {
			return g.done(), nil
		}
	}
	return nil, fmt.Errorf("more than %d records: %w", maxReplies*recordsAsked, dr.ErrUnsupported)
}
