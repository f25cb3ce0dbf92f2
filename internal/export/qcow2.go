package export

import (
	"context"
	"encoding/binary"
	"fmt"
)

// Numbers of the qcow2 format, from QEMU's docs/interop/qcow2.txt.
const (
	qcowMagic    = 0x514649fb // "QFI\xfb"
	qcowCopied   = 1 << 63    // refcount is exactly one
	qcowEntries  = unit / 8   // per table cluster
	qcowCounts   = unit / 2   // 16-bit refcounts per cluster
	qcowHeadSize = 104
)

// qcow writes an image from front to back:
//
//	| header | L1 table | data clusters and L2 tables, as they come | refcount blocks | refcount table |
//
// A cluster has 64 KiB. An L2 table maps 512 MiB of the disk; it takes its
// place when the first data of its range comes and is written when the range
// is through, so only one is in memory. The header is written last: before
// that the file is no image.
type qcow struct {
	f    ImageFile
	size int64
	next int64    // first free cluster
	l1   []uint64 // offsets of the L2 tables
	l2   []uint64 // of range cur
	cur  int64    // index into l1, or -1
}

// WriteQcow2 writes src to f as a qcow2 image of version 3; zeroes take no
// space. What was in the file is lost. When it fails or is cancelled, the file
// is no valid image.
func WriteQcow2(ctx context.Context, f ImageFile, src Source, progress Progress) error {
	size := src.Size()
	if err := f.Truncate(0); err != nil {
		return fmt.Errorf("empty image: %w", err)
	}
	q := &qcow{f: f, size: size, cur: -1}
	q.l1 = make([]uint64, (size+unit*qcowEntries-1)/(unit*qcowEntries))
	q.next = 1 + q.l1Clusters()
	progress.report(0, size)
	if err := pump(ctx, src, 0, q.data, func(off int64) { progress.report(off, size) }); err != nil {
		return err
	}
	if err := q.finish(); err != nil {
		return fmt.Errorf("finish image: %w", err)
	}
	progress.report(size, size)
	return nil
}

func (q *qcow) l1Clusters() int64 { return int64(len(q.l1)+qcowEntries-1) / qcowEntries }

// data places a run of units. It lies within one L2 table: pieces don't cross
// windows, and windows don't cross tables.
func (q *qcow) data(off int64, p []byte) error {
	if err := q.enter(off / (unit * qcowEntries)); err != nil {
		return err
	}
	first := q.next
	for at := off / unit; at*unit < off+int64(len(p)); at++ {
		q.l2[at%qcowEntries] = uint64(q.next)*unit | qcowCopied
		q.next++
	}
	return q.write(first, p)
}

// enter makes the L2 table of a range the present one.
func (q *qcow) enter(table int64) error {
	if table == q.cur {
		return nil
	}
	if err := q.leave(); err != nil {
		return err
	}
	q.l1[table] = uint64(q.next)*unit | qcowCopied
	q.l2, q.cur = make([]uint64, qcowEntries), table
	q.next++
	return nil
}

// leave writes the present L2 table.
func (q *qcow) leave() error {
	if q.cur < 0 {
		return nil
	}
	return q.write(int64(q.l1[q.cur]&^qcowCopied)/unit, words(q.l2))
}

func (q *qcow) write(cluster int64, p []byte) error {
	if _, err := q.f.WriteAt(p, cluster*unit); err != nil {
		return fmt.Errorf("write image at %d: %w", cluster*unit, err)
	}
	return nil
}

// words encodes a table, padded to whole clusters.
func words(table []uint64) []byte {
	b := make([]byte, (len(table)*8+unit-1)/unit*unit)
	for i, w := range table {
		binary.BigEndian.PutUint64(b[i*8:], w)
	}
	return b
}

// finish writes what is known only now. The refcounts count themselves, too.
func (q *qcow) finish() error {
	if err := q.leave(); err != nil {
		return err
	}
	blocks, table := int64(0), int64(1)
	for {
		total := q.next + blocks + table
		b := (total + qcowCounts - 1) / qcowCounts
		t := (b + qcowEntries - 1) / qcowEntries
		if b == blocks && t == table {
			break
		}
		blocks, table = b, t
	}
	total := q.next + blocks + table
	refs := make([]uint64, blocks)
	for i := range refs {
		refs[i] = uint64(q.next+int64(i)) * unit
		if err := q.write(q.next+int64(i), counts(min(qcowCounts, total-int64(i)*qcowCounts))); err != nil {
			return err
		}
	}
	if err := q.write(q.next+blocks, words(refs)); err != nil {
		return err
	}
	if len(q.l1) > 0 {
		if err := q.write(1, words(q.l1)); err != nil {
			return err
		}
	}
	if err := q.f.Truncate(total * unit); err != nil {
		return err
	}
	if err := q.f.Sync(); err != nil {
		return err
	}
	if err := q.write(0, q.header(uint64(q.next+blocks)*unit, uint32(table))); err != nil {
		return err
	}
	return q.f.Sync()
}

// counts is a refcount block whose first n clusters are used once.
func counts(n int64) []byte {
	b := make([]byte, unit)
	for i := range n {
		b[2*i+1] = 1
	}
	return b
}

func (q *qcow) header(refTable uint64, refClusters uint32) []byte {
	b := make([]byte, qcowHeadSize+8) // ends with an empty header extension
	be := binary.BigEndian
	be.PutUint32(b[0:], qcowMagic)
	be.PutUint32(b[4:], 3)   // version
	be.PutUint32(b[20:], 16) // log2 of the cluster size
	be.PutUint64(b[24:], uint64(q.size))
	be.PutUint32(b[36:], uint32(len(q.l1)))
	be.PutUint64(b[40:], unit) // L1 table
	be.PutUint64(b[48:], refTable)
	be.PutUint32(b[56:], refClusters)
	be.PutUint32(b[96:], 4) // log2 of the bits of a refcount
	be.PutUint32(b[100:], qcowHeadSize)
	return b
}
