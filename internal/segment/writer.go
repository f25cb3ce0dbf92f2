package segment

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"sync"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

// Writer appends frames to a segment that is not sealed.
type Writer struct {
	file   vfs.File
	reader *Reader // owns the list of entries

	// Only Append changes these; no one else reads them meanwhile.
	cursor frame.Cursor
	marked int64 // what the last sync mark says
	torn   bool  // a failed Append may have left bytes behind the end

	mu struct {
		sync.Mutex
		size   int64 // bytes of the file that count
		synced int64 // bytes known to be durable
		err    error // why the writer is of no use any more
	}
}

// newWriter returns the writer of a segment of size bytes, all durable; marked
// is what its last sync mark says.
func newWriter(f vfs.File, r *Reader, at frame.Cursor, size, marked int64) *Writer {
	w := &Writer{file: f, reader: r, cursor: at, marked: marked}
	w.mu.size, w.mu.synced = size, size
	return w
}

// Create makes the segment that continues start in dir and makes its header and name durable.
// The error wraps dr.ErrExists when the file is there already.
func Create(fsys vfs.FS, dir string, start frame.Cursor) (*Writer, error) {
	return CreateAs(fsys, dir, Name(start), start)
}

// CreateAs is Create with a file name for the time being. Whoever renames the
// file, when it is sealed and closed, tells the Reader by Moved.
func CreateAs(fsys vfs.FS, dir, base string, start frame.Cursor) (*Writer, error) {
	name := path.Join(dir, base)
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
	return newWriter(f, r, start, headerSize, headerSize), nil
}

// Recover opens a segment that is not sealed for appending, after its writer
// stopped in whatever way. It verifies every frame and cuts off what a crash
// tore; what is left is durable when it returns. It refuses to cut off what can
// be shown to have been synced (dr.ErrCorrupt) or made by a newer program (dr.ErrVersion).
func Recover(fsys vfs.FS, dir, name string) (*Writer, error) {
	full := path.Join(dir, name)
	f, err := fsys.OpenFile(full)
	if err != nil {
		return nil, fmt.Errorf("recover segment: %w", err)
	}
	w, err := recoverFile(fsys, f, full)
	if err == nil {
		err = fsys.SyncDir(dir) // a Create that failed there may have left the file
	}
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
	if x, err := readIndex(f, size, start); err != nil {
		return nil, err
	} else if x != nil {
		return nil, fmt.Errorf("segment is sealed: %w", dr.ErrInvalid)
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
	if err := rewrite(f, s.synced, s.end); err != nil {
		return nil, err
	}
	// The cut too must be durable before anything new takes its place: frames
	// that were cut off could come back behind others of the same numbers.
	if err := f.Sync(); err != nil {
		return nil, fmt.Errorf("sync segment: %w", err)
	}
	r := newReader(fsys, name, start)
	r.mu.entries, r.mu.end = s.entries, s.cursor
	return newWriter(f, r, s.cursor, s.end, max(s.synced, headerSize)), nil
}

// rewrite writes what no mark vouches for as it is. If the writer before died of a failed
// fsync, the page cache shows bytes that the disk lacks and holds for written:
// an fsync alone would report success without them.
func rewrite(f vfs.File, from, to int64) error {
	buf := make([]byte, min(1<<20, to-from))
	for from < to {
		b := buf[:min(int64(len(buf)), to-from)]
		if err := readFull(f, b, from); err != nil {
			return err
		}
		if _, err := f.WriteAt(b, from); err != nil {
			return fmt.Errorf("write recovered frames: %w", err)
		}
		from += int64(len(b))
	}
	return nil
}

// Append writes a frame behind the last; it is not durable before Sync. Errors
// of frame.Check mean that f does not continue the segment; after any error the segment is as it was.
func (w *Writer) Append(f *frame.Frame) (Entry, error) {
	w.mu.Lock()
	at, synced, err := w.mu.size, w.mu.synced, w.mu.err
	w.mu.Unlock()
	if err == nil {
		err = f.Check(w.cursor)
	}
	if err == nil {
		err = w.cutTorn(at)
	}
	if err != nil {
		return Entry{}, fmt.Errorf("append: %w", err)
	}
	w.torn = true
	if synced > w.marked {
		if _, err := w.file.WriteAt(putMark(at, synced), at); err != nil {
			return Entry{}, fmt.Errorf("append mark: %w", err)
		}
		at += markSize
	}
	if _, err := w.file.WriteAt(f.Bytes(), at); err != nil {
		return Entry{}, fmt.Errorf("append frame: %w", err)
	}
	w.torn = false
	e := entryOf(at, &f.Header)
	w.marked = max(w.marked, synced)
	w.cursor = f.End()
	w.mu.Lock()
	w.mu.size = at + e.Len
	w.mu.Unlock()
	w.reader.grow(e, w.cursor)
	return e, nil
}

// cutTorn removes what a failed Append left behind size: it may be longer than
// what comes next.
func (w *Writer) cutTorn(size int64) error {
	if !w.torn {
		return nil
	}
	if err := w.file.Truncate(size); err != nil {
		return fmt.Errorf("cut failed append: %w", err)
	}
	w.torn = false
	return nil
}

// Sync makes all frames durable whose Append had returned before the call.
// After an error nothing is known of the file: every later call fails, and
// only Recover helps.
func (w *Writer) Sync() error {
	w.mu.Lock()
	size, synced, err := w.mu.size, w.mu.synced, w.mu.err
	w.mu.Unlock()
	if err != nil || synced == size {
		return err
	}
	err = w.file.Sync()
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.mu.err = fmt.Errorf("sync segment: %w", err)
		return w.mu.err
	}
	w.mu.synced = max(w.mu.synced, size)
	return nil
}

// Cursor returns what the next frame must continue.
func (w *Writer) Cursor() frame.Cursor { return w.cursor }

// Size returns the bytes of the segment so far.
func (w *Writer) Size() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mu.size
}

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
	size := w.Size()
	err := w.cutTorn(size)
	if err == nil {
		_, err = w.file.WriteAt(putFooter(size, w.reader.Entries(), w.cursor), size)
	}
	if err == nil {
		err = w.file.Sync()
	}
	if err != nil {
		return w.end(fmt.Errorf("seal segment: %w", err))
	}
	w.reader.seal()
	_ = w.end(fmt.Errorf("segment is sealed: %w", dr.ErrInvalid))
	return nil
}

// end makes every later call fail with err, and returns it.
func (w *Writer) end(err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.err = err
	return err
}

// Close closes the file; it neither syncs nor seals.
func (w *Writer) Close() error {
	if w.file == nil {
		return nil
	}
	_ = w.end(fmt.Errorf("segment writer is closed: %w", dr.ErrInvalid))
	f := w.file
	w.file = nil
	return f.Close()
}
