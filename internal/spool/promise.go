package spool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"path"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

// What was promised as stored is noted in a file of its own, so that a spool that
// comes back with less can say so: damage to the newest frames alone looks like what a
// crash tears off. The note is written after the fsync that it tells of and is not synced itself: it may be
// old, never ahead of the truth.
//
// Its 64 bytes: magic FSPM, version (2) = 1, zero (2), timeline (4), zero (4), sequence (8),
// first 32 bytes of the chain, zero (4), CRC-32C of the 60 bytes before.
const (
	promiseName = "PROMISED"
	promiseSize = 64
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func putPromise(c frame.Cursor) []byte {
	b := make([]byte, promiseSize)
	copy(b, "FSPM")
	binary.LittleEndian.PutUint16(b[4:], 1)
	binary.LittleEndian.PutUint32(b[8:], uint32(c.Position.Timeline))
	binary.LittleEndian.PutUint64(b[16:], uint64(c.Position.Seq))
	copy(b[24:56], c.Chain[:])
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	return b
}

// parsePromise reports false for anything but a whole promise: then nothing is known.
func parsePromise(b []byte) (at dr.Position, ok bool) {
	if len(b) != promiseSize {
		return at, false
	}
	at = dr.Position{Timeline: dr.Timeline(binary.LittleEndian.Uint32(b[8:])), Seq: dr.Seq(binary.LittleEndian.Uint64(b[16:]))}
	c := frame.Cursor{Position: at, Chain: [32]byte(b[24:56])}
	return at, string(putPromise(c)) == string(b)
}

// loadPromise compares what was promised with what is there.
func (s *Spool) loadPromise() error {
	full := path.Join(s.dir, promiseName)
	b, err := vfs.ReadFile(s.fs, full, promiseSize)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read promise: %w", err)
	}
	have := s.mu.synced.Position
	if at, ok := parsePromise(b); ok && (len(s.mu.parts) == 0 || at.Timeline == have.Timeline && at.Seq > have.Seq) {
		s.mu.lost = at
	}
	return nil
}

// writePromise writes the note; the file is opened or made by the first.
func (s *Spool) writePromise(b []byte) error {
	if s.promise == nil {
		full := path.Join(s.dir, promiseName)
		f, err := s.fs.OpenFile(full)
		if errors.Is(err, fs.ErrNotExist) {
			f, err = s.fs.Create(full)
		}
		if err != nil {
			return err
		}
		s.promise = f
	}
	_, err := s.promise.WriteAt(b, 0)
	return err
}

// noteLocked notes what may be told to have been stored. It is advice: if
// writing fails, an older note or none is left.
func (s *Spool) noteLocked() {
	if s.mu.synced == s.mu.noted {
		return
	}
	if s.writePromise(putPromise(s.mu.synced)) == nil {
		s.mu.noted = s.mu.synced
	}
}

// forgetPromise comes before what was promised is dropped on purpose.
func (s *Spool) forgetPromise() error {
	s.mu.noted, s.mu.lost = frame.Cursor{}, dr.Position{}
	if err := s.writePromise(make([]byte, promiseSize)); err != nil {
		return err
	}
	return s.promise.Sync()
}

// Lost returns the position up to which frames were promised as stored when the
// spool was opened without them; ok is false if there are none such.
func (s *Spool) Lost() (at dr.Position, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.lost, s.mu.lost != dr.Position{}
}
