package demo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"time"
)

// recordSize is the length of a record on the disk.
const recordSize = 9 << 10

// recordMagic begins each record.
const recordMagic = "FARSREC1"

// A disk of records is what the demo protects where it may not mount a file system: a database in its simplest
// form, records one after another from the disk's beginning.
//
//	0   8  magic
//	8   8  number, from 1, little-endian
//	16  8  UTC nanoseconds of its writing
//	24  4  length of the content
//	28  4  zero
//	32  32 SHA-256 of the record with this field zero
//	64     content, the rest zero

// record returns record n as it lies on the disk.
func record(n, at int64) []byte {
	b := make([]byte, recordSize)
	body := content(n)
	copy(b, recordMagic)
	binary.LittleEndian.PutUint64(b[8:], uint64(n))
	binary.LittleEndian.PutUint64(b[16:], uint64(at))
	binary.LittleEndian.PutUint32(b[24:], uint32(len(body)))
	copy(b[64:], body)
	sum := sha256.Sum256(b)
	copy(b[32:], sum[:])
	return b
}

// isRecord reports whether b is record n, whole.
func isRecord(b []byte, n int64) bool {
	return len(b) == recordSize && bytes.Equal(b, record(n, int64(binary.LittleEndian.Uint64(b[16:]))))
}

// flusher is a disk whose writes become durable with Flush.
type flusher interface {
	io.WriterAt
	Flush() error
}

// loadRecords writes records, each made durable, and logs each, until ctx is done or the disk is full.
func loadRecords(ctx context.Context, disk flusher, size int64, rate int, log io.Writer) error {
	pace := newPace(rate)
	for n := int64(1); n*recordSize <= size && pace.wait(ctx); n++ {
		begin := time.Now().UnixNano()
		if _, err := disk.WriteAt(record(n, begin), (n-1)*recordSize); err != nil {
			return fmt.Errorf("write record %d: %w", n, err)
		}
		if err := disk.Flush(); err != nil {
			return fmt.Errorf("write record %d: %w", n, err)
		}
		if err := appendCommit(log, commit{N: n, Begin: begin, End: time.Now().UnixNano()}); err != nil {
			return err
		}
	}
	return nil
}

// checkRecords counts the records from the first on, and proves that nothing but zeroes lies behind them.
func checkRecords(disk io.ReaderAt, size int64) (verdict, error) {
	var v verdict
	b := make([]byte, recordSize)
	for off := int64(0); off+recordSize <= size; off += recordSize {
		if _, err := disk.ReadAt(b, off); err != nil {
			return v, fmt.Errorf("read record %d: %w", v.Rows+1, err)
		}
		switch {
		case v.Rows == off/recordSize && isRecord(b, v.Rows+1):
			v.Rows++
		case !isZero(b):
			v.What = fmt.Sprintf("at %d lies something that is not record %d", off, v.Rows+1)
			return v, nil
		}
	}
	v.OK = v.Rows > 0
	if !v.OK {
		v.What = "there is no record"
	}
	return v, nil
}

// sumRecords returns the SHA-256 of the first n records, as the guest computes it.
func sumRecords(disk io.ReaderAt, n int64) ([32]byte, error) {
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(disk, 0, n*recordSize)); err != nil {
		return [32]byte{}, fmt.Errorf("sum records: %w", err)
	}
	return [32]byte(h.Sum(nil)), nil
}

func isZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
