package load

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Loop is a loop device over a file.
type Loop struct{ Device, File string }

// NewLoop makes file a sparse file of size bytes (or keeps it, if size is 0)
// and attaches a loop device to it. It needs root.
func NewLoop(file string, size int64) (*Loop, error) {
	if size > 0 {
		f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		err = errors.Join(f.Truncate(size), f.Close())
		if err != nil {
			return nil, fmt.Errorf("size %s: %w", file, err)
		}
	}
	// Another process may attach the device that losetup has found.
	var out string
	var err error
	for range 10 {
		if out, err = run("losetup", "--find", "--show", file); err == nil {
			return &Loop{Device: strings.TrimSpace(out), File: file}, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil, err
}

// Close detaches the device; the file stays.
func (l *Loop) Close() error {
	_, err := run("losetup", "--detach", l.Device)
	return err
}

// Format makes a file system of kind fs (ext4, xfs, btrfs) on the device.
func (l *Loop) Format(fs string) error {
	args := map[string][]string{"ext4": {"-q", "-F"}, "xfs": {"-q", "-f"}, "btrfs": {"-q", "-f"}}[fs]
	_, err := run("mkfs."+fs, append(args, l.Device)...)
	return err
}

// Mount mounts the device at dir, which it makes, with further arguments of mount;
// unmount undoes that.
func (l *Loop) Mount(dir string, args ...string) (unmount func() error, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if _, err := run("mount", append(args, l.Device, dir)...); err != nil {
		return nil, err
	}
	return func() (err error) {
		// A process that another test is just starting may hold what this one has open.
		for range 100 {
			if _, err = run("umount", dir); err == nil || !strings.Contains(err.Error(), "busy") {
				return err
			}
			time.Sleep(100 * time.Millisecond)
		}
		return err
	}, nil
}

const (
	fifreeze = 0xc0045877
	fithaw   = 0xc0045878
)

// Freeze freezes the file system mounted at dir until thaw is called.
func Freeze(dir string) (thaw func() error, err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.IoctlSetInt(int(d.Fd()), fifreeze, 0); err != nil {
		d.Close()
		return nil, fmt.Errorf("freeze %s: %w", dir, err)
	}
	return func() error {
		return errors.Join(unix.IoctlSetInt(int(d.Fd()), fithaw, 0), d.Close())
	}, nil
}

// checks are the read-only judgements of file systems, each to be given the device.
var checks = map[string][]string{"ext4": {"e2fsck", "-fn"}, "xfs": {"xfs_repair", "-n"}, "btrfs": {"btrfs", "check", "--readonly"}}

// Checkers returns the programs that CheckImage needs for a kind of file system.
func Checkers(fs string) []string { return checks[fs][:1] }

// CheckImage judges a recovered image of a file system as an administrator
// would: mount it (which replays the journal), check the load's database, unmount,
// and run the file system's own check without repairing. It returns the highest row of the
// database. The original must not be mounted if it is a btrfs.
func CheckImage(ctx context.Context, fs, image, dir string) (row int64, err error) {
	err = WithImage(fs, image, dir, func() error {
		row, err = CheckDatabase(ctx, dir)
		return err
	})
	return row, err
}

// WithImage mounts the image at dir, calls use, unmounts it, and checks the file
// system.
func WithImage(fs, image, dir string, use func() error) (err error) {
	var options []string
	switch fs {
	case "xfs":
		options = []string{"-o", "nouuid"} // the original may be mounted
	case "btrfs": // the kernel remembers devices of this identity, perhaps in a newer state
		if _, err := run("btrfs", "device", "scan", "--forget"); err != nil {
			return err
		}
	}
	l, err := NewLoop(image, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	unmount, err := l.Mount(dir, options...)
	if err != nil {
		return err
	}
	if err := errors.Join(use(), unmount()); err != nil {
		return err
	}
	check := checks[fs]
	_, err = run(check[0], append(check[1:len(check):len(check)], l.Device)...)
	return err
}

func run(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}
