package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

const (
	// pieceSize is how long reads and fallback zeroes are cut.
	pieceSize = 1 << 20
	// maxExtents bounds the answer to one block status request.
	maxExtents = 8192
)

// refusal is an error number with the reason, which structured replies carry.
func refusal(e Errno, format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, e)...)
}

// check says why a request can't be done, before its payload is read.
func (ss *session) check(q *request) error {
	if err := ss.checkFlags(q); err != nil {
		return err
	}
	switch q.cmd {
	case cmdFlush:
		return nil
	case cmdRead, cmdWrite:
		if q.length > MaxRequest {
			return refusal(ss.tooLong(q), "request of %d bytes", q.length)
		}
	case cmdTrim:
		if ss.flags&(txSendTrim|txReadOnly) == 0 {
			return refusal(ENOTSUP, "trim")
		}
	case cmdWriteZeroes, cmdCache:
	case cmdBlockStatus:
		if !ss.allocation || q.length == 0 {
			return refusal(EINVAL, "block status without context or length")
		}
	default:
		return refusal(EINVAL, "command %d", q.cmd)
	}
	return ss.checkRange(q)
}

// tooLong is EOVERFLOW where the protocol has a name for it.
func (ss *session) tooLong(q *request) Errno {
	if q.flags&cmdFlagDF != 0 {
		return EOVERFLOW
	}
	return EINVAL
}

func (ss *session) checkFlags(q *request) error {
	allowed := uint16(cmdFlagFUA)
	switch q.cmd {
	case cmdRead:
		if ss.structured {
			allowed |= cmdFlagDF
		}
	case cmdWriteZeroes:
		allowed |= cmdFlagNoHole
		if ss.flags&txSendFastZero != 0 {
			allowed |= cmdFlagFastZero
		}
	case cmdBlockStatus:
		allowed |= cmdFlagReqOne
	}
	if q.flags&^allowed != 0 {
		return refusal(EINVAL, "flags %#x of command %d", q.flags, q.cmd)
	}
	return nil
}

func (ss *session) checkRange(q *request) error {
	writes := q.cmd == cmdWrite || q.cmd == cmdWriteZeroes
	if (writes || q.cmd == cmdTrim) && ss.flags&txReadOnly != 0 {
		return refusal(EPERM, "export is read-only")
	}
	if q.end() > ss.size || q.end() < q.offset {
		if writes {
			return refusal(ENOSPC, "write behind the end")
		}
		return refusal(EINVAL, "request behind the end")
	}
	if m := uint64(ss.export.minBlock()); (q.offset|uint64(q.length))&(m-1) != 0 {
		return refusal(EINVAL, "request not aligned to %d bytes", m)
	}
	return nil
}

// serve does one request and answers it. Errors of the connection stay in the
// sender.
func (ss *session) serve(q request) {
	switch {
	case q.cmd == cmdRead && ss.structured:
		ss.readStructured(q)
	case q.cmd == cmdRead:
		ss.readSimple(q)
	case q.cmd == cmdBlockStatus && ss.structured:
		ss.blockStatus(q)
	default:
		err := q.err
		if err == nil {
			err = ss.change(&q)
		}
		ss.srv.mem.put(q.buf)
		ss.replySimple(q, err)
	}
}

// change does the commands that only answer whether they worked.
func (ss *session) change(q *request) (err error) {
	dev, off, n := ss.export.Device, int64(q.offset), int64(q.length)
	switch q.cmd {
	case cmdFlush:
		return dev.Flush()
	case cmdCache:
		if p, ok := dev.(Prefetcher); ok && n > 0 {
			return p.Prefetch(off, n)
		}
		return nil
	case cmdWrite:
		start := time.Now()
		err = ss.write(q.buf.data(), off)
		ss.keepPace(q, start)
	case cmdTrim:
		if n > 0 {
			err = dev.(Trimmer).Trim(off, n)
		}
	case cmdWriteZeroes:
		if n > 0 {
			err = ss.zero(off, n, q.flags)
		}
	}
	if err == nil && q.flags&cmdFlagFUA != 0 {
		err = dev.Flush()
	}
	return err
}

func (ss *session) write(p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	n, err := ss.export.Device.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}

func (ss *session) zero(off, n int64, flags uint16) error {
	err := errors.ErrUnsupported
	if flags&cmdFlagNoHole == 0 {
		if z, ok := ss.export.Device.(Zeroer); ok {
			err = z.Zero(off, n)
		}
	} else if z, ok := ss.export.Device.(NoHoleZeroer); ok {
		err = z.ZeroNoHole(off, n)
	}
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	if flags&cmdFlagFastZero != 0 {
		return refusal(ENOTSUP, "fast zero")
	}
	zeroes := ss.srv.zeroes
	for end := off + n; off < end; off += int64(len(zeroes)) {
		if err := ss.write(zeroes[:min(end-off, int64(len(zeroes)))], off); err != nil {
			return err
		}
	}
	return nil
}

func (ss *session) replySimple(q request, err error) {
	b := make([]byte, simpleSize)
	putSimple(b, errnoOf(err), q.handle)
	ss.out.send(outgoing{bytes: b})
}

// readRoom is how large a buffer a read starts with. Without chunks the whole
// must be read before the first byte can be sent.
func (ss *session) readRoom(q *request) int {
	if ss.structured && q.flags&cmdFlagDF == 0 {
		return int(min(q.length, pieceSize))
	}
	return int(q.length)
}

func (ss *session) readSimple(q request) {
	err := q.err
	if err == nil {
		start := time.Now()
		err = ss.readInto(q.buf.data(), int64(q.offset))
		ss.keepPace(&q, start)
	}
	if err != nil {
		ss.srv.mem.put(q.buf)
		ss.replySimple(q, err)
		return
	}
	b := q.buf.withHead(simpleSize)
	putSimple(b, 0, q.handle)
	ss.out.send(outgoing{b, q.buf})
}

// readInto fills p or fails. A device may say io.EOF with the last bytes.
func (ss *session) readInto(p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	n, err := ss.export.Device.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// readStructured answers with data and hole chunks; the last one is marked.
// An error after the first chunk is told with its offset.
func (ss *session) readStructured(q request) {
	if q.err != nil || q.length == 0 {
		ss.srv.mem.put(q.buf)
		ss.endChunks(q.handle, q.err, nil)
		return
	}
	for off, end := q.offset, q.end(); off < end; {
		n := end - off
		if q.flags&cmdFlagDF == 0 {
			n = min(n, pieceSize)
		}
		last := uint16(0)
		if off+n == end {
			last = chunkFlagDone
		}
		if err := ss.sendPiece(&q, last, off, int(n)); err != nil {
			ss.endChunks(q.handle, err, &off)
			return
		}
		off += n
	}
}

// sendPiece reads and sends one piece. It uses the request's buffer first. What
// is all zeroes goes as a hole: to look is cheaper than to send, and cheaper
// than to ask a device for its map, whose answer may be as long as the disk.
func (ss *session) sendPiece(q *request, last uint16, off uint64, n int) (err error) {
	buf := q.buf
	q.buf = nil
	if buf == nil {
		if buf, err = ss.srv.mem.get(ss.ctx, n); err != nil {
			return err
		}
	}
	buf.n = n // the last piece may be shorter than the room
	start := time.Now()
	err = ss.readInto(buf.data(), int64(off))
	ss.keepPace(q, start)
	if err != nil {
		ss.srv.mem.put(buf)
		return err
	}
	if n <= pieceSize && bytes.Equal(buf.data(), ss.srv.zeroes[:n]) {
		ss.srv.mem.put(buf)
		ss.sendHole(q.handle, last, off, uint32(n))
		return nil
	}
	b := buf.withHead(dataHeaderSize)
	putChunk(b, last, chunkOffsetData, q.handle, uint32(n+8))
	binary.BigEndian.PutUint64(b[chunkSize:], off)
	ss.out.send(outgoing{b, buf})
	return nil
}

func (ss *session) sendHole(handle uint64, last uint16, off uint64, n uint32) {
	b := make([]byte, chunkSize+12)
	putChunk(b, last, chunkOffsetHole, handle, 12)
	binary.BigEndian.PutUint64(b[chunkSize:], off)
	binary.BigEndian.PutUint32(b[chunkSize+8:], n)
	ss.out.send(outgoing{bytes: b})
}

// endChunks ends a structured reply that has no data: nothing, or an error
// with a text and, if known, where it happened.
//
//	error u32 | text length u16 | text | offset u64, if known
func (ss *session) endChunks(handle uint64, err error, at *uint64) {
	if err == nil {
		b := make([]byte, chunkSize)
		putChunk(b, chunkFlagDone, chunkNone, handle, 0)
		ss.out.send(outgoing{bytes: b})
		return
	}
	text := err.Error()
	text = strings.ToValidUTF8(text[:min(len(text), 512)], "")
	b := make([]byte, chunkSize+6, chunkSize+6+len(text)+8)
	binary.BigEndian.PutUint32(b[chunkSize:], uint32(errnoOf(err)))
	binary.BigEndian.PutUint16(b[chunkSize+4:], uint16(len(text)))
	b = append(b, text...)
	typ := uint16(chunkError)
	if at != nil {
		typ = chunkErrorOffset
		b = binary.BigEndian.AppendUint64(b, *at)
	}
	putChunk(b, chunkFlagDone, typ, handle, uint32(len(b)-chunkSize))
	ss.out.send(outgoing{bytes: b})
}

// blockStatus answers with the extents of base:allocation:
//
//	context u32 | (length u32, state u32)...
func (ss *session) blockStatus(q request) {
	if q.err != nil {
		ss.endChunks(q.handle, q.err, nil)
		return
	}
	limit := maxExtents
	if q.flags&cmdFlagReqOne != 0 {
		limit = 1
	}
	extents, err := ss.extents(int64(q.offset), int64(q.length), limit)
	if err != nil {
		ss.endChunks(q.handle, err, nil)
		return
	}
	b := make([]byte, chunkSize+4, chunkSize+4+8*len(extents))
	putChunk(b, chunkFlagDone, chunkBlockStatus, q.handle, uint32(4+8*len(extents)))
	binary.BigEndian.PutUint32(b[chunkSize:], contextID)
	for _, e := range extents {
		b = binary.BigEndian.AppendUint32(b, e.length)
		b = binary.BigEndian.AppendUint32(b, e.state)
	}
	ss.out.send(outgoing{bytes: b})
}

type statusExtent struct{ length, state uint32 }

// extents collects up to limit extents of [off, off+n), neighbours of the
// same state joined. A device without a map is all data.
func (ss *session) extents(off, n int64, limit int) ([]statusExtent, error) {
	m, ok := ss.export.Device.(Mapper)
	if !ok {
		return []statusExtent{{length: uint32(n)}}, nil
	}
	var all []statusExtent
	left := n
	err := m.Map(off, n, func(_, l int64, zero, hole bool) error {
		var state uint32
		if zero {
			state |= stateZero
		}
		if hole {
			state |= stateHole
		}
		l = min(l, left)
		if last := len(all) - 1; last >= 0 && all[last].state == state {
			all[last].length += uint32(l)
		} else if len(all) == limit {
			return errDone
		} else {
			all = append(all, statusExtent{uint32(l), state})
		}
		left -= l
		if left == 0 {
			return errDone
		}
		return nil
	})
	if err != nil && !errors.Is(err, errDone) {
		return nil, err
	}
	if len(all) == 0 || all[0].length == 0 {
		return nil, fmt.Errorf("device's map says nothing about offset %d: %w", off, EIO)
	}
	return all, nil
}
