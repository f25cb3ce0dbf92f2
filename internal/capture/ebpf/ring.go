package ebpf

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"farside/internal/capture"
	"farside/internal/dr"
)

// A ring reads a BPF ring buffer through its memory. Positions count bytes since
// the ring was made. The kernel writes records at the producer's position, each
//
//	u32 length | busy bit 31 | discarded bit 30
//	u32 (the kernel's)
//	length bytes, padded to 8
//
// and frees what is below the consumer's position. A record that goes round the
// end of the data is put together in a buffer.
type ring struct {
	consumer, producer *uint64 // shared with the kernel
	data               []byte  // size bytes
	size               uint64
	pos                uint64 // where the next record begins; the consumer's position may lag
	around             []byte // holds the last record that went round the end
}

const (
	recordBusy      = 1 << 31
	recordDiscarded = 1 << 30
	recordHeader    = 8
)

// next returns the next record and steps behind it. The record is valid until its
// place is freed, or the next one goes round the end. It returns nil if there is none (yet).
func (r *ring) next() []byte {
	for r.pos < atomic.LoadUint64(r.producer) {
		at, head := r.head(r.pos)
		if head&recordBusy != 0 {
			return nil // being written; its time will come
		}
		n := recordLength(head)
		r.pos += recordSize(n)
		if head&recordDiscarded == 0 {
			return r.piece(at+recordHeader, n)
		}
	}
	return nil
}

// head returns where the record at pos begins in the data, and its first word.
func (r *ring) head(pos uint64) (at uint64, head uint32) {
	at = pos & (r.size - 1)
	return at, atomic.LoadUint32(word32(r.data[at:]))
}

func recordLength(head uint32) uint64 { return uint64(head &^ (recordBusy | recordDiscarded)) }

// recordSize is what a record of n bytes takes of the ring.
func recordSize(n uint64) uint64 { return (recordHeader + n + 7) &^ 7 }

// piece returns n bytes from at on, which may be behind the end.
func (r *ring) piece(at, n uint64) []byte {
	at &= r.size - 1
	if at+n <= r.size {
		return r.data[at:][:n:n]
	}
	r.around = append(r.around[:0], r.data[at:]...)
	r.around = append(r.around, r.data[:min(at+n-r.size, r.size)]...)
	return r.around
}

// begins reports whether a record begins, or the last one ends, at pos, which is
// not below from, the beginning of one.
func (r *ring) begins(from, pos uint64) bool {
	for end := atomic.LoadUint64(r.producer); from < pos && from < end; {
		_, head := r.head(from)
		from += recordSize(recordLength(head))
	}
	return from == pos
}

// release gives everything before pos back to the kernel.
func (r *ring) release(pos uint64) { atomic.StoreUint64(r.consumer, pos) }

// header is what a record of the programs begins with (struct header of
// bpf/state.h).
type header struct {
	offset int64  // bytes from the start of the disk
	time   int64  // ns of the monotonic clock
	length uint32 // bytes
	watch  uint16 // index of the disk
	kind   uint16
}

const (
	headerSize  = 24
	kindData    = 1
	kindZero    = 2
	kindDiscard = 3
	kindFlush   = 4
	kindSoft    = 5

	// softFailure is the kind of event of a captured write that failed, see softWrite. It
	// is not handed over.
	softFailure capture.EventKind = 255
)

// parseRecord makes an event of a record; Data points into it. Time is left as the
// monotonic clock had it.
func parseRecord(rec []byte, disks []capture.Disk) (capture.Event, error) {
	if len(rec) < headerSize {
		return capture.Event{}, fmt.Errorf("ring record of %d bytes: %w", len(rec), dr.ErrCorrupt)
	}
	h := header{
		offset: int64(binary.LittleEndian.Uint64(rec)),
		time:   int64(binary.LittleEndian.Uint64(rec[8:])),
		length: binary.LittleEndian.Uint32(rec[16:]),
		watch:  binary.LittleEndian.Uint16(rec[20:]),
		kind:   binary.LittleEndian.Uint16(rec[22:]),
	}
	if int(h.watch) >= len(disks) {
		return capture.Event{}, fmt.Errorf("ring record of disk number %d: %w", h.watch, dr.ErrCorrupt)
	}
	d := disks[h.watch]
	e := capture.Event{Kind: capture.Change, Time: h.time, Extent: dr.Extent{Disk: d.ID, Offset: h.offset, Length: int64(h.length)}}
	if h.offset < 0 || h.offset > d.Size-int64(h.length) {
		return e, fmt.Errorf("ring record of %v of a disk of %d bytes: %w", e.Extent, d.Size, dr.ErrCorrupt)
	}
	switch h.kind {
	case kindData:
		e.What = dr.Data
		if int(h.length) > len(rec)-headerSize {
			return e, fmt.Errorf("ring record of %v in %d bytes: %w", e.Extent, len(rec), dr.ErrCorrupt)
		}
		e.Data = rec[headerSize:][:h.length:h.length]
	case kindZero:
		e.What = dr.Zero
	case kindDiscard:
		e.What = dr.Discard
	case kindFlush:
		e.Kind, e.Extent = capture.Flush, dr.Extent{Disk: d.ID}
	case kindSoft:
		e.Kind = softFailure
	default:
		return e, fmt.Errorf("ring record of kind %d: %w", h.kind, dr.ErrCorrupt)
	}
	return e, nil
}
