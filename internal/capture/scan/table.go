package scan

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"farside/internal/dr"
)

// block is the unit of comparing, in bytes.
const block = 64 << 10

// sum is the hash of a block; the zero value is that of a block that was never read.
type sum [16]byte

// The layout of a table's file, see docs/format/scantable.md.
const (
	tableMagic   = "FSSCANTB"
	tableVersion = 1
	tableHeader  = 4096
	sliceSums    = 4096 // entries in memory at a time, of a table that is a file
)

// table holds the hash of each block of one disk, in memory or in a file. It is
// not safe for concurrent use.
type table struct {
	count int64 // blocks
	known int64 // of them that were read
	mem   []sum // all, if there is no file

	file  *os.File
	slice []byte // part of it in memory …
	at    int64  // … from this block on; -1: none
	dirty bool
}

// newTable makes an empty table for size bytes of disk, in memory if dir is "".
func newTable(dir string, id dr.DiskID, size int64) (*table, error) {
	t := &table{count: (size + block - 1) / block, at: -1}
	if dir == "" {
		t.mem = make([]sum, t.count)
		return t, nil
	}
	path := filepath.Join(dir, fmt.Sprintf("scan-%d.table", id))
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make scan table: %w", err)
	}
	t.file, t.slice = f, make([]byte, sliceSums*len(sum{}))
	header := make([]byte, tableHeader)
	copy(header, tableMagic)
	binary.LittleEndian.PutUint32(header[8:], tableVersion)
	binary.LittleEndian.PutUint32(header[12:], block)
	binary.LittleEndian.PutUint64(header[16:], uint64(size))
	binary.LittleEndian.PutUint16(header[24:], uint16(id))
	if _, err := f.WriteAt(header, 0); err != nil {
		return nil, fmt.Errorf("make scan table: %w", errors.Join(err, t.close()))
	}
	return t, nil
}

// entry returns the place of a block's hash.
func (t *table) entry(b int64) ([]byte, error) {
	if t.file == nil {
		return t.mem[b][:], nil
	}
	if first := b - b%sliceSums; first != t.at {
		if err := t.load(first); err != nil {
			return nil, err
		}
	}
	const n = int64(len(sum{}))
	return t.slice[(b-t.at)*n : (b-t.at+1)*n], nil
}

// load brings the slice that begins with block first into memory.
func (t *table) load(first int64) error {
	if err := t.flush(); err != nil {
		return err
	}
	t.at = -1
	n, err := t.file.ReadAt(t.slice, tableHeader+first*int64(len(sum{})))
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read scan table: %w", err)
	}
	clear(t.slice[n:]) // behind the end: never written
	t.at = first
	return nil
}

// flush writes the slice in memory if it was changed.
func (t *table) flush() error {
	if !t.dirty {
		return nil
	}
	if _, err := t.file.WriteAt(t.slice, tableHeader+t.at*int64(len(sum{}))); err != nil {
		return fmt.Errorf("write scan table: %w", err)
	}
	t.dirty = false
	return nil
}

// get returns the hash of a block.
func (t *table) get(b int64) (s sum, err error) {
	e, err := t.entry(b)
	copy(s[:], e)
	return s, err
}

// set replaces the hash of a block and reports whether it was another one.
func (t *table) set(b int64, s sum) (changed bool, err error) {
	e, err := t.entry(b)
	if err != nil || sum(e) == s {
		return false, err
	}
	if sum(e) == (sum{}) {
		t.known++
	}
	copy(e, s[:])
	t.dirty = t.file != nil
	return true, nil
}

// close closes and removes the file: it means nothing to the next process.
func (t *table) close() error {
	if t.file == nil {
		return nil
	}
	return errors.Join(t.file.Close(), os.Remove(t.file.Name()))
}

// newKey returns the key of the hashes: nobody can make blocks that collide.
func newKey() ([]byte, error) {
	key := make([]byte, 32)
	_, err := rand.Read(key)
	return key, err
}
