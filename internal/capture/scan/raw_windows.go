package scan

import (
	"encoding/binary"
	"os"
	"strings"
	"syscall"
)

// ioctlDiskGetLengthInfo is IOCTL_DISK_GET_LENGTH_INFO of winioctl.h.
const ioctlDiskGetLengthInfo = 0x7405c

// deviceNames begins the names of volumes and disks, which are read in whole sectors only.
const deviceNames = `\\.\`

// openRaw opens a file, a volume (\\.\C:) or a disk (\\.\PhysicalDrive0). Others may go on writing.
func openRaw(path string) (f *os.File, cold bool, err error) {
	f, err = os.Open(path)
	return f, strings.HasPrefix(path, deviceNames), err
}

// sizeOf returns the size of a file, volume or disk.
func sizeOf(f *os.File) (int64, error) {
	if !strings.HasPrefix(f.Name(), deviceNames) {
		info, err := f.Stat()
		if err != nil {
			return 0, err
		}
		return info.Size(), nil
	}
	var out [8]byte
	var n uint32
	if err := syscall.DeviceIoControl(syscall.Handle(f.Fd()), ioctlDiskGetLengthInfo, nil, 0, &out[0], uint32(len(out)), &n, nil); err != nil {
		return 0, os.NewSyscallError("IOCTL_DISK_GET_LENGTH_INFO", err)
	}
	return int64(binary.LittleEndian.Uint64(out[:])), nil
}
