package fsmap

import (
	"encoding/binary"
	"fmt"

	"farside/internal/dr"
)

// superblockEnd is how much of a volume is read to know what is on it.
const superblockEnd = 4096

// Where the fields are: linux/fs/ext4/ext4.h (struct ext4_super_block, 1024 bytes from the
// beginning), linux/fs/xfs/libxfs/xfs_format.h (struct xfs_dsb).
const (
	ext4At        = 1024
	ext4Magic     = 0xEF53
	ext4MagicAt   = ext4At + 0x38
	ext4CompatAt  = ext4At + 0x5C
	ext4ROAt      = ext4At + 0x64
	hasJournal    = 0x4
	fastCommit    = 0x400
	bigAlloc      = 0x200
	xfsMagic      = "XFSB"
	xfsVersionAt  = 100
	xfsVersion5   = 5
	xfsVersionNum = 0xF
)

// judge says which kind of file system begins with head, and refuses those whose free blocks may
// matter, or whose answer is not known to be right. Errors wrap dr.ErrUnsupported.
func judge(head []byte) (Kind, error) {
	if len(head) < superblockEnd {
		return "", fmt.Errorf("superblock of %d bytes: %w", len(head), dr.ErrUnsupported)
	}
	if string(head[:4]) == xfsMagic {
		if v := binary.BigEndian.Uint16(head[xfsVersionAt:]) & xfsVersionNum; v != xfsVersion5 {
			return XFS, fmt.Errorf("xfs of version %d: %w", v, dr.ErrUnsupported)
		}
		return XFS, nil
	}
	le := binary.LittleEndian
	switch {
	case le.Uint16(head[ext4MagicAt:]) != ext4Magic:
		return "", fmt.Errorf("neither ext4 nor xfs: %w", dr.ErrUnsupported)
	case le.Uint32(head[ext4CompatAt:])&hasJournal == 0:
		return Ext4, fmt.Errorf("ext4 without a journal: %w", dr.ErrUnsupported)
	case le.Uint32(head[ext4CompatAt:])&fastCommit != 0:
		// Its records are not whole blocks: what recovery reads before it writes is not known well enough.
		return Ext4, fmt.Errorf("ext4 with fast commits: %w", dr.ErrUnsupported)
	case le.Uint32(head[ext4ROAt:])&bigAlloc != 0:
		return Ext4, fmt.Errorf("ext4 with bigalloc: %w", dr.ErrUnsupported)
	}
	return Ext4, nil
}
