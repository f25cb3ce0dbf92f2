package segment

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"farside/internal/dr"
	"farside/internal/frame"
)

// scanned is what reading an unsealed segment from the front found.
type scanned struct {
	entries []Entry
	cursor  frame.Cursor // after the last good frame
	end     int64        // offset behind it
}

// scan verifies the frames of a segment up to the first that is not there, not
// whole or does not continue the one before. The error is one of reading only.
func scan(f io.ReaderAt, size int64, start frame.Cursor) (scanned, error) {
	s := scanned{cursor: start, end: headerSize}
	var buf []byte
	for at := s.end; ; at = s.end {
		var mark [markSize]byte
		if at+markSize <= size {
			if err := readFull(f, mark[:], at); err != nil {
				return s, err
			}
			if _, ok := parseMark(mark[:], at); ok {
				at += markSize
			}
		}
		if at+frame.HeaderSize > size {
			return s, nil
		}
		h, err := frameHeader(f, at)
		if err != nil || at+h.Size() > size {
			return s, ioOnly(err)
		}
		if int64(cap(buf)) < h.Size() {
			buf = make([]byte, h.Size())
		}
		buf = buf[:h.Size()]
		if err := readFull(f, buf, at); err != nil {
			return s, err
		}
		fr, err := frame.Parse(buf)
		if err != nil || fr.Verify() != nil || fr.Check(s.cursor) != nil {
			return s, nil //nolint:nilerr // a frame that is not whole is the end
		}
		s.entries = append(s.entries, entryOf(at, &fr.Header))
		s.cursor, s.end = fr.End(), at+h.Size()
	}
}

// ioOnly drops the errors that speak of the content.
func ioOnly(err error) error {
	if errors.Is(err, dr.ErrCorrupt) || errors.Is(err, dr.ErrVersion) {
		return nil
	}
	return err
}

// checkTorn reports dr.ErrCorrupt when a sync mark behind the end proves that
// what lies before the mark, good once, was durable.
func (s *scanned) checkTorn(f io.ReaderAt, size int64) error {
	const chunk = 1 << 20
	buf := make([]byte, chunk+markSize)
	for off := s.end + 1; off < size; off += chunk { // a mark right at the end tears nothing
		b := buf[:min(int64(len(buf)), size-off)]
		if err := readFull(f, b, off); err != nil {
			return err
		}
		for i := 0; ; i++ {
			k := bytes.Index(b[i:], []byte(magicMark))
			if k < 0 {
				break
			}
			i += k
			if synced, ok := parseMark(b[i:], off+int64(i)); ok && synced > s.end {
				return fmt.Errorf("frame at %d is damaged, though everything before %d had been synced: %w", s.end, synced, dr.ErrCorrupt)
			}
		}
	}
	return nil
}
