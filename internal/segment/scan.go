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
	synced  int64        // the marks up to there say that this much is durable
}

// scan verifies the frames of a segment up to the first that is not there, not
// whole or does not continue the one before. The error is one of reading, or
// dr.ErrVersion for a frame of a newer program.
func scan(f io.ReaderAt, size int64, start frame.Cursor) (scanned, error) {
	s := scanned{cursor: start, end: headerSize}
	var buf []byte
	for at := s.end; ; at = s.end {
		marked := s.synced
		var mark [markSize]byte
		if at+markSize <= size {
			if err := readFull(f, mark[:], at); err != nil {
				return s, err
			}
			if synced, ok := parseMark(mark[:], at); ok {
				marked = max(marked, synced)
				at += markSize
			}
		}
		if at+frame.HeaderSize > size {
			return s, nil
		}
		h, err := frameHeader(f, at)
		if err != nil || at+h.Size() > size {
			return s, notDamage(err)
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
		s.cursor, s.end, s.synced = fr.End(), at+h.Size(), marked
	}
}

// notDamage drops the error that says that the content is not a frame.
func notDamage(err error) error {
	if errors.Is(err, dr.ErrCorrupt) {
		return nil
	}
	return err
}

// checkTorn reports dr.ErrCorrupt when a sync mark behind the end, or a trailer,
// proves that what lies between was durable and good once.
func (s *scanned) checkTorn(f io.ReaderAt, size int64) error {
	if size-s.end >= trailerSize {
		var b [trailerSize]byte
		if err := readFull(f, b[:], size-trailerSize); err != nil {
			return err
		}
		if t, ok := parseTrailer(b[:], size); ok && t.footer > s.end {
			return s.damaged(t.footer)
		}
	}
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
				return s.damaged(synced)
			}
		}
	}
	return nil
}

func (s *scanned) damaged(synced int64) error {
	return fmt.Errorf("frame at %d is damaged, though everything before %d had been synced: %w", s.end, synced, dr.ErrCorrupt)
}
