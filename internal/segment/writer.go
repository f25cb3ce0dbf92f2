package segment

import (
	"errors"
	"fmt"
	"io/fs"
	"path"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

// Writer appends frames to a segment that is not sealed.
type Writer struct {
	file   vfs.File
	reader *Reader // owns the list of entries

	cursor frame.Cursor
	size   int64 // bytes of the file that count
	synced int64 // bytes known to be durable
	err    error // why the writer is of no use any more
}

// Create makes the segment that continues start in dir and makes its header and name durable.
// The error wraps dr.ErrExists when the file is there already.
func Create(fsys vfs.FS, dir string, start frame.Cursor) (*Writer, error) {
	name := path.Join(dir, Name(start))
	if _, err := fsys.Stat(name); err == nil {
		return nil, fmt.Errorf("create segment %s: %w", name, dr.ErrExists)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("create segment: %w", err)
	}
	f, err := fsys.Create(name)
	if err != nil {
		return nil, fmt.Errorf("create segment: %w", err)
	}
	if _, err = f.WriteAt(putHeader(start), 0); err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = fsys.SyncDir(dir)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create segment %s: %w", name, err), f.Close(), fsys.Remove(name))
	}
	r := newReader(fsys, name, start)
	return &Writer{file: f, reader: r, cursor: start, size: headerSize, synced: headerSize}, nil
}

// Recover opens a segment that is not sealed for appending, after its writer
// stopped in whatever way. It verifies every frame and cuts off what a crash
// tore; it refuses, with dr.ErrCorrupt, to cut off what had been synced. What
// is left may not be durable yet: call Sync before promising it to anyone.
func Recover(fsys vfs.FS, dir, name string) (*Writer, error) {
	full := path.Join(dir, name)
	f, err := fsys.OpenFile(full)
	if err != nil {
		return nil, fmt.Errorf("recover segment: %w", err)
	}
	w, err := recoverFile(fsys, f, full)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("recover segment %s: %w", full, err), f.Close())
	}
	return w, nil
}

func recoverFile(fsys vfs.FS, f vfs.File, name string) (*Writer, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	start, err := readHeader(f, size, name)
	if err != nil {
		return nil, err
	}
	if _, sealed, err := readTrailer(f, size); err != nil || sealed {
		return nil, errors.Join(err, fmt.Errorf("segment is sealed: %w", dr.ErrInvalid))
	}
	s, err := scan(f, size, start)
	if err != nil {
		return nil, err
	}
	if s.end < size {
		if err := s.checkTorn(f, size); err != nil {
			return nil, err
		}
		if err := f.Truncate(s.end); err != nil {
			return nil, fmt.Errorf("cut torn tail: %w", err)
		}
	}
	r := newReader(fsys, name, start)
	r.mu.entries, r.mu.end = s.entries, s.cursor
	return &Writer{file: f, reader: r, cursor: s.cursor, size: s.end}, nil
}

// Append writes a frame behind the last; it is not durable before Sync. Errors
// of frame.Check mean that f does not continue the segment; after any error the segment is as it was.
func (w *Writer) Append(f *frame.Frame) (Entry, error) {
	if w.err != nil {
		return Entry{}, w.err
	}
	if err := f.Check(w.cursor); err != nil {
		return Entry{}, fmt.Errorf("append: %w", err)
	}
	at := w.size
	if w.synced == w.size && w.size > headerSize {
		if _, err := w.file.WriteAt(putMark(at, w.cursor.Position.Seq), at); err != nil {
			return Entry{}, fmt.Errorf("append mark: %w", err)
		}
		at += markSize
	}
	if _, err := w.file.WriteAt(f.Bytes(), at); err != nil {
		return Entry{}, fmt.Errorf("append frame: %w", err)
	}
	e := entryOf(at, &f.Header)
	w.size = at + e.Len
	w.cursor = f.End()
	w.reader.grow(e, w.cursor)
	return e, nil
}

// Sync makes all appended frames durable. After an error nothing is known of
// the file: every later call fails, and only Recover helps.
func (w *Writer) Sync() error {
	if w.err != nil || w.synced == w.size {
		return w.err
	}
	if err := w.file.Sync(); err != nil {
		w.err = fmt.Errorf("sync segment: %w", err)
		return w.err
	}
	w.synced = w.size
	return nil
}

// Cursor returns what the next frame must continue.
func (w *Writer) Cursor() frame.Cursor { return w.cursor }

// Size returns the bytes of the segment so far.
func (w *Writer) Size() int64 { return w.size }

// Reader returns the reader of this segment, always the same one. It sees
// each frame as soon as Append has returned, and stays usable after Close.
func (w *Writer) Reader() *Reader { return w.reader }

// Seal writes the footer and makes the whole segment durable. Only Close may
// follow.
func (w *Writer) Seal() error {
	// Frames first: a trailer that a crash lets through must not vouch for torn frames.
	if err := w.Sync(); err != nil {
		return err
	}
	if _, err := w.file.WriteAt(putFooter(w.size, w.reader.Entries(), w.cursor), w.size); err != nil {
		w.err = fmt.Errorf("write segment footer: %w", err)
		return w.err
	}
	w.synced = 0
	if err := w.Sync(); err != nil {
		return err
	}
	w.reader.seal()
	w.err = fmt.Errorf("segment is sealed: %w", dr.ErrInvalid)
	return nil
}

// Close closes the file; it neither syncs nor seals.
func (w *Writer) Close() error {
	if w.file == nil {
		return nil
	}
	f := w.file
	w.file, w.err = nil, fmt.Errorf("segment writer is closed: %w", dr.ErrInvalid)
	return f.Close()
}
