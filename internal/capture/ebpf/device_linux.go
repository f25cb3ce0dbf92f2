//go:build linux && amd64

package ebpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"farside/internal/capture"
	"farside/internal/dr"
)

// A device is a block device that is captured: a whole disk or a partition.
type device struct {
	disk  capture.Disk
	fd    int    // O_DIRECT, read only
	block int64  // logical block size, bytes
	dev   uint32 // of the whole disk, as the kernel encodes it
	start uint64 // first sector on the whole disk
	sysfs string // directory of the device
	whole string // directory of the whole disk
	mq    bool   // uses requests
	seq   uint64 // of the whole disk: another one after a change of medium, or of a loop device's file; 0 before Linux 5.15
}

// openDevice opens the block device of d for reading and finds its place on its
// whole disk. It refuses what is known not to work.
func openDevice(d capture.Disk) (*device, error) {
	fd, err := unix.Open(d.Path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open: %w", kindOf(err))
	}
	dev := &device{disk: d, fd: fd}
	if err := dev.identify(); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return dev, nil
}

// kindOf adds the kind of error that callers act on.
func kindOf(err error) error {
	kind := dr.ErrUnavailable
	switch {
	case errors.Is(err, fs.ErrNotExist):
		kind = dr.ErrNotFound
	case errors.Is(err, fs.ErrPermission):
		kind = dr.ErrDenied
	case errors.Is(err, unix.EINVAL): // O_DIRECT on a file that can't
		kind = dr.ErrInvalid
	}
	return fmt.Errorf("%w: %w", err, kind)
}

func (d *device) identify() error {
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return fmt.Errorf("not a block device: %w", dr.ErrInvalid)
	}
	var err error
	link := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	if d.sysfs, err = filepath.EvalSymlinks(link); err != nil {
		return fmt.Errorf("find in sysfs: %w", err)
	}
	d.whole = d.sysfs
	if exists(d.sysfs + "/partition") {
		d.whole = filepath.Dir(d.sysfs)
		if d.start, err = readNumber(d.sysfs + "/start"); err != nil {
			return err
		}
	}
	if err := refuse(d.whole); err != nil {
		return err
	}
	if err := d.measure(); err != nil {
		return err
	}
	d.mq = exists(d.whole + "/mq")
	d.seq, err = d.readSeq()
	return err
}

// readSeq returns the number that the kernel gave to the disk's present medium.
func (d *device) readSeq() (uint64, error) {
	n, err := readNumber(d.whole + "/diskseq")
	if errors.Is(err, fs.ErrNotExist) && exists(d.whole) {
		return 0, nil
	}
	return n, err
}

// refuse says why the disk in a sysfs directory can't be captured, if so.
func refuse(whole string) error {
	switch {
	case exists(whole + "/dm"):
		return fmt.Errorf("device mapper: capture of it is not proven; name the disks below it: %w", dr.ErrUnsupported)
	case exists(whole + "/md"):
		return fmt.Errorf("MD array: capture of it is not proven; name the disks below it: %w", dr.ErrUnsupported)
	case strings.HasPrefix(filepath.Base(whole), "loop") && !exists(whole+"/loop/backing_file"):
		return fmt.Errorf("loop device without a file: %w", dr.ErrUnavailable)
	}
	if zoned, err := os.ReadFile(whole + "/queue/zoned"); err == nil && strings.TrimSpace(string(zoned)) != "none" {
		return fmt.Errorf("zoned disk (%s): %w", strings.TrimSpace(string(zoned)), dr.ErrUnsupported)
	}
	return nil
}

// measure finds sizes and the number of the whole disk.
func (d *device) measure() error {
	var size uint64
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(d.fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size))); e != 0 {
		return fmt.Errorf("ask for the size: %w", e)
	}
	block, err := unix.IoctlGetInt(d.fd, unix.BLKSSZGET)
	if err != nil {
		return fmt.Errorf("ask for the block size: %w", err)
	}
	d.block = int64(block)
	if size == 0 {
		return fmt.Errorf("empty: %w", dr.ErrUnavailable)
	}
	if d.disk.Size != 0 && d.disk.Size != int64(size) {
		return fmt.Errorf("has %d bytes, not %d: %w", size, d.disk.Size, dr.ErrInvalid)
	}
	d.disk.Size = int64(size)
	text, err := os.ReadFile(d.whole + "/dev")
	if err != nil {
		return err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err != nil {
		return fmt.Errorf("parse %s/dev: %w", d.whole, err)
	}
	d.dev = major<<20 | minor
	return nil
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

func readNumber(name string) (uint64, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
}

// end returns the sector behind the device on its whole disk.
func (d *device) end() uint64 { return d.start + uint64(d.disk.Size)/dr.SectorSize }

// overlaps reports whether the two share sectors of a disk.
func (d *device) overlaps(o *device) bool {
	return d.dev == o.dev && d.start < o.end() && o.start < d.end()
}

// writesInFlight returns how many writes the driver of the whole disk has now.
// Writes that wait for the driver are not counted.
func (d *device) writesInFlight() (int, error) {
	text, err := os.ReadFile(d.whole + "/inflight")
	if err != nil {
		return 0, fmt.Errorf("read writes in flight of %s: %w", d.disk.Path, err)
	}
	var reads, writes int
	if _, err := fmt.Sscan(string(text), &reads, &writes); err != nil {
		return 0, fmt.Errorf("read writes in flight of %s: %w", d.disk.Path, err)
	}
	return writes, nil
}

// written returns what the kernel has counted since the device came up: bytes, and
// writes as they were submitted (those that it merged count apart).
func (d *device) written() (bytes, writes uint64, err error) {
	text, err := os.ReadFile(d.sysfs + "/stat")
	if err != nil {
		return 0, 0, err
	}
	return parseStat(string(text))
}

func parseStat(text string) (bytes, writes uint64, err error) {
	fields := strings.Fields(text)
	if len(fields) < 7 {
		return 0, 0, fmt.Errorf("read block statistics: %d fields: %w", len(fields), dr.ErrInvalid)
	}
	var n [3]uint64 // writes, merged ones, sectors
	for i := range n {
		if n[i], err = strconv.ParseUint(fields[4+i], 10, 64); err != nil {
			return 0, 0, fmt.Errorf("read block statistics: %w: %w", err, dr.ErrInvalid)
		}
	}
	return n[2] * dr.SectorSize, n[0] + n[1], nil
}

// directAlign is an alignment of memory that is enough for O_DIRECT.
const directAlign = 4096

// directBuffers holds aligned buffers of bufferSize bytes.
type directBuffers struct{ pool sync.Pool }

const bufferSize = 1 << 20

func (b *directBuffers) get() *[]byte {
	if p, ok := b.pool.Get().(*[]byte); ok {
		return p
	}
	p := aligned(bufferSize)
	return &p
}

// aligned returns n bytes whose address suits O_DIRECT.
func aligned(n int) []byte {
	p := make([]byte, n+directAlign)
	skip := -uintptr(unsafe.Pointer(&p[0])) & (directAlign - 1)
	return p[skip:][:n:n]
}

// readAt reads below the page cache, through b if p is not aligned.
func (d *device) readAt(p []byte, off int64, b *directBuffers) (int, error) {
	if off < 0 || off > d.disk.Size-int64(len(p)) || off%dr.SectorSize != 0 || len(p)%dr.SectorSize != 0 {
		return 0, fmt.Errorf("%d bytes at %d: %w", len(p), off, dr.ErrInvalid)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if off%d.block == 0 && int64(len(p))%d.block == 0 && uintptr(unsafe.Pointer(&p[0]))%directAlign == 0 {
		return d.pread(p, off)
	}
	buf := b.get()
	defer b.pool.Put(buf)
	for n := 0; n < len(p); {
		from := (off + int64(n)) &^ (d.block - 1)
		skip := int(off + int64(n) - from)
		want := min((int64(skip+len(p)-n)+d.block-1)&^(d.block-1), bufferSize)
		if _, err := d.pread((*buf)[:want], from); err != nil {
			return n, err
		}
		n += copy(p[n:], (*buf)[skip:want])
	}
	return len(p), nil
}

func (d *device) pread(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		m, err := unix.Pread(d.fd, p[n:], off+int64(n))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return n, err
		case m == 0:
			return n, fmt.Errorf("device ended: %w", dr.ErrUnavailable)
		}
		n += max(m, 0)
	}
	return len(p), nil
}
