package vault

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"maps"
	"path"
	"sync"

	"farside/internal/dr"
	"farside/internal/extent"
	"farside/internal/vfs"
)

const (
	sumsVersion = 1
	sumsHeader  = 64
	sumBlock    = 64 << 10 // bytes of image per checksum
	sumSize     = 4
)

var sumsMagic = [4]byte{'F', 'S', 'B', 'S'}

// zeroBlockSum is the checksum of a block of zeroes; stored sums are XORed
// with it, so that those of a hole are zero.
var zeroBlockSum = sync.OnceValue(func() uint32 { return crc32.Checksum(make([]byte, sumBlock), castagnoli) })

// image is the base image of a disk with its checksums. Reading is safe at any
// time; one fold at a time writes.
type image struct {
	disk dr.Disk
	file vfs.File
	sums vfs.File
}

// makeImage creates the image of a disk, or grows the one that is there.
func (v *Vault) makeImage(d dr.Disk) error {
	name, sums := path.Join(v.dir, imageName(d.ID)), path.Join(v.dir, sumsName(d.ID))
	if old, there := v.manifest.Load().disk(d.ID); !there {
		if err := errors.Join(createSized(v.fs, name, d.Size, nil),
			createSized(v.fs, sums, sumsLength(d.Size), sumsHead(d.ID)),
			v.fs.SyncDir(path.Join(v.dir, baseDir))); err != nil {
			return fmt.Errorf("make image of disk %d: %w", d.ID, err)
		}
	} else if old.Size < d.Size {
		if err := errors.Join(growFile(v.fs, name, d.Size), growFile(v.fs, sums, sumsLength(d.Size))); err != nil {
			return fmt.Errorf("grow image of disk %d: %w", d.ID, err)
		}
	}
	return v.openImage(d)
}

func createSized(fsys vfs.FS, name string, size int64, head []byte) error {
	f, err := fsys.Create(name)
	if err != nil {
		return err
	}
	if err = f.Truncate(size); err == nil && head != nil {
		_, err = f.WriteAt(head, 0)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func growFile(fsys vfs.FS, name string, size int64) error {
	f, err := fsys.OpenFile(name)
	if err != nil {
		return err
	}
	if err = f.Truncate(size); err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// sumsLength is the length of the checksum file of a disk.
func sumsLength(size int64) int64 { return sumsHeader + sumSize*((size+sumBlock-1)/sumBlock) }

func sumsHead(disk dr.DiskID) []byte {
	b := make([]byte, sumsHeader)
	copy(b, sumsMagic[:])
	le.PutUint16(b[4:], sumsVersion)
	le.PutUint16(b[6:], uint16(disk))
	le.PutUint32(b[8:], sumBlock)
	le.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	return b
}

// openImage opens the image of a disk and puts it in place of an older handle.
func (v *Vault) openImage(d dr.Disk) error {
	i := &image{disk: d}
	var err error
	if i.file, err = openSized(v.fs, path.Join(v.dir, imageName(d.ID)), d.Size); err != nil {
		return err
	}
	if i.sums, err = openSized(v.fs, path.Join(v.dir, sumsName(d.ID)), sumsLength(d.Size)); err != nil {
		return errors.Join(err, i.file.Close())
	}
	head := make([]byte, sumsHeader)
	if err := readFull(i.sums, head, 0); err != nil || string(head) != string(sumsHead(d.ID)) {
		return errors.Join(fmt.Errorf("checksums of disk %d: header: %w", d.ID, dr.ErrCorrupt), err, i.close())
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	all := maps.Clone(*v.images.Load())
	if old := all[d.ID]; old != nil {
		v.mu.outgrown = append(v.mu.outgrown, old) // reads may be under way
	}
	all[d.ID] = i
	v.images.Store(&all)
	return nil
}

// openSized opens a file that must be at least size long. One that is longer
// is from a growth that a crash interrupted.
func openSized(fsys vfs.FS, name string, size int64) (vfs.File, error) {
	f, err := fsys.OpenFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is missing: %w", name, dr.ErrCorrupt)
	}
	if err != nil {
		return nil, err
	}
	n, err := f.Size()
	if err == nil && n < size {
		err = fmt.Errorf("%s has %d bytes instead of %d: %w", name, n, size, dr.ErrCorrupt)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// image returns the image of a disk, or nil.
func (v *Vault) image(disk dr.DiskID) *image { return (*v.images.Load())[disk] }

func (i *image) close() error { return errors.Join(i.file.Close(), i.sums.Close()) }

// hole reports whether the image is known to read as zeroes at off, and how
// far, within [off, end), that answer holds.
func (i *image) hole(off, end int64) (bool, int64) {
	start, stop, err := vfs.NextData(i.file, off)
	switch {
	case errors.Is(err, io.EOF):
		return true, end
	case err != nil: // then saying data is always right
		return false, end
	case start > off:
		return true, min(start, end)
	}
	return false, min(stop, end)
}

// updateSums computes the checksums of blocks anew from the image.
func (i *image) updateSums(blocks *extent.Set) error {
	buf := make([]byte, sumBlock)
	for r := range blocks.All() {
		for n := r.Start; n < r.End; {
			next, err := i.updateRun(n, r.End, buf)
			if err != nil {
				return fmt.Errorf("write checksums of disk %d: %w", i.disk.ID, err)
			}
			n = next
		}
	}
	return nil
}

// updateRun computes the checksums of block n or, if a hole begins there, drops
// those of all blocks within it; it returns the block behind, at most end.
func (i *image) updateRun(n, end int64, buf []byte) (int64, error) {
	hole, until := i.hole(n*sumBlock, min(end*sumBlock, i.disk.Size))
	if until == i.disk.Size {
		until = end * sumBlock // the last block may be short
	}
	if stop := until / sumBlock; hole && stop > n {
		return stop, vfs.PunchHole(i.sums, sumsHeader+sumSize*n, sumSize*(stop-n))
	}
	sum, err := i.sum(n, buf)
	if err != nil {
		return n, err
	}
	_, err = i.sums.WriteAt(le.AppendUint32(nil, sum), sumsHeader+sumSize*n)
	return n + 1, err
}

// sum computes the stored form of the checksum of block n; buf has sumBlock bytes.
func (i *image) sum(n int64, buf []byte) (uint32, error) {
	size := min(sumBlock, i.disk.Size-n*sumBlock)
	if err := readFull(i.file, buf[:size], n*sumBlock); err != nil {
		return 0, fmt.Errorf("read image of disk %d at %d: %w", i.disk.ID, n*sumBlock, err)
	}
	clear(buf[size:])
	return crc32.Checksum(buf, castagnoli) ^ zeroBlockSum(), nil
}
