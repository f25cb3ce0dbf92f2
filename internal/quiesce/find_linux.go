package quiesce

import (
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"farside/internal/dr"
)

// Find returns the mounted and writable file systems that lie on the disks, in the
// order in which they may be frozen. Errors wrap dr.ErrNotFound if a disk is not
// there, dr.ErrUnsupported if what lies on what can't be told.
func Find(disks []string) ([]FileSystem, error) {
	s := system{root: os.DirFS("/"), devno: deviceNumber, loop: loopBehind}
	return s.find(disks)
}

// deviceNumber returns the number of a block device.
func deviceNumber(name string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return "", fmt.Errorf("look at %s: %w: %w", name, err, dr.ErrNotFound)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return "", nil // a file behind a tap: no file system of ours lies on it
	}
	return number(st.Rdev), nil
}

func number(dev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev)) }

// loopBehind asks a loop device: what sysfs says is a path, which may mean something
// else by now.
func loopBehind(dev string) (loopBacking, error) {
	name, err := os.Readlink("/sys/dev/block/" + dev)
	if err != nil {
		return loopBacking{}, err
	}
	f, err := os.Open("/dev/" + path.Base(name))
	if err != nil {
		return loopBacking{}, err
	}
	defer f.Close()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return loopBacking{}, err
	}
	if info.Rdevice != 0 {
		return loopBacking{device: number(info.Rdevice)}, nil
	}
	return loopBacking{superblock: superblockOf(number(info.Device), "/sys/dev/block/"+dev+"/loop/backing_file")}, nil
}

// superblockOf returns the number by which mountinfo knows the file system of a file, of
// which its own number is known and a file of sysfs that holds its path. On btrfs the two
// numbers differ. "" if it can't be told.
func superblockOf(own, sysfs string) string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	mounts := parseMountinfo(string(text), "")
	if !strings.HasPrefix(own, "0:") || slices.ContainsFunc(mounts, func(m mount) bool { return m.dev == own }) {
		return own
	}
	name, err := os.ReadFile(sysfs)
	if err != nil {
		return ""
	}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, strings.TrimSpace(string(name)), 0, unix.STATX_MNT_ID, &st); err != nil {
		return ""
	}
	for _, m := range mounts {
		if m.id == strconv.FormatUint(st.Mnt_id, 10) {
			return m.dev
		}
	}
	return ""
}
