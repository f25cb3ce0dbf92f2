package segment

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"sync"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

// Reader reads a segment. It is safe for concurrent use, also with the Writer
// that it came from.
type Reader struct {
	fs    vfs.FS
	name  string
	start frame.Cursor

	mu struct {
		sync.RWMutex
		file    vfs.File // opened by the first read
		entries []Entry  // grows only
		end     frame.Cursor
		sealed  bool
		torn    int64
	}
}

func newReader(fsys vfs.FS, name string, start frame.Cursor) *Reader {
	r := &Reader{fs: fsys, name: name, start: start}
	r.mu.end = start
	return r
}

// Open opens a segment for reading. A sealed one costs two small reads and its
// footer; of another every frame is verified, and what does not continue it is
// left out: see Torn. Errors wrap dr.ErrCorrupt or dr.ErrVersion.
func Open(fsys vfs.FS, dir, name string) (*Reader, error) {
	full := path.Join(dir, name)
	f, err := fsys.Open(full)
	if err != nil {
		return nil, fmt.Errorf("open segment: %w", err)
	}
	r, err := openFile(fsys, f, full)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open segment %s: %w", full, err), f.Close())
	}
	return r, nil
}

func openFile(fsys vfs.FS, f vfs.File, name string) (*Reader, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	start, err := readHeader(f, size, name)
	if err != nil {
		return nil, err
	}
	r := newReader(fsys, name, start)
	r.mu.file = f
	x, err := readIndex(f, size, start)
	if err != nil {
		return nil, err
	}
	if x == nil {
		s, err := scan(f, size, start)
		if err != nil {
			return nil, err
		}
		r.mu.entries, r.mu.end, r.mu.torn = s.entries, s.cursor, size-s.end
		return r, nil
	}
	r.mu.sealed, r.mu.entries = true, x.entries
	if n := len(x.entries); n > 0 {
		last := x.entries[n-1]
		r.mu.end.Position.Seq, r.mu.end.Time, r.mu.end.Chain = last.Last, last.LastTime, x.chain
	}
	return r, nil
}

// readFull fills p; a file that ends before is dr.ErrCorrupt.
func readFull(f io.ReaderAt, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return fmt.Errorf("file ends at %d, expected %d bytes at %d: %w", off+int64(n), len(p), off, dr.ErrCorrupt)
	}
	return fmt.Errorf("read segment: %w", err)
}

func readHeader(f io.ReaderAt, size int64, name string) (frame.Cursor, error) {
	if size < headerSize {
		return frame.Cursor{}, fmt.Errorf("segment of %d bytes has no header: %w", size, dr.ErrCorrupt)
	}
	var b [headerSize]byte
	if err := readFull(f, b[:], 0); err != nil {
		return frame.Cursor{}, err
	}
	c, err := parseHeader(b[:])
	if err == nil {
		if _, _, nameErr := ParseName(path.Base(name)); nameErr == nil && Name(c) != path.Base(name) {
			err = fmt.Errorf("segment header says %s: %w", Name(c), dr.ErrCorrupt)
		}
	}
	return c, err
}

// index is what footer and trailer of a sealed segment say.
type index struct {
	entries []Entry
	chain   [32]byte
}

// readIndex returns nil when the segment is not sealed: without a good trailer
// and footer, as also a crash in Seal leaves it.
func readIndex(f io.ReaderAt, size int64, start frame.Cursor) (*index, error) {
	if size < headerSize+trailerSize {
		return nil, nil //nolint:nilnil // not sealed is no error
	}
	var b [trailerSize]byte
	if err := readFull(f, b[:], size-trailerSize); err != nil {
		return nil, err
	}
	t, ok := parseTrailer(b[:], size)
	if !ok {
		return nil, nil //nolint:nilnil // as above
	}
	footer := make([]byte, entrySize*t.entries)
	if err := readFull(f, footer, t.footer); err != nil {
		return nil, err
	}
	entries, ok := parseFooter(footer, t, start)
	if !ok {
		return nil, nil //nolint:nilnil // as above
	}
	return &index{entries, t.chain}, nil
}

func (r *Reader) grow(e Entry, end frame.Cursor) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.entries = append(r.mu.entries, e)
	r.mu.end = end
}

func (r *Reader) seal() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.sealed = true
}

// Start returns what the first frame continues.
func (r *Reader) Start() frame.Cursor { return r.start }

// End returns the cursor after the last frame.
func (r *Reader) End() frame.Cursor {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.mu.end
}

// Sealed reports whether the segment is complete.
func (r *Reader) Sealed() bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.mu.sealed
}

// Torn returns how many bytes behind the last good frame of a segment that is
// not sealed are of no use.
func (r *Reader) Torn() int64 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.mu.torn
}

// Entries returns the index of all frames so far, in order; it must not be
// changed.
func (r *Reader) Entries() []Entry {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return slices.Clip(r.mu.entries)
}

// Find returns the entry of the frame that holds seq.
func (r *Reader) Find(seq dr.Seq) (Entry, bool) {
	entries := r.Entries()
	i, _ := slices.BinarySearchFunc(entries, seq, func(e Entry, s dr.Seq) int {
		if e.Last < s {
			return -1
		}
		return 1
	})
	if i == len(entries) || entries[i].First > seq {
		return Entry{}, false
	}
	return entries[i], true
}

// handle returns the open file.
func (r *Reader) handle() (vfs.File, error) {
	r.mu.RLock()
	f := r.mu.file
	r.mu.RUnlock()
	if f != nil {
		return f, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.file == nil {
		f, err := r.fs.Open(r.name)
		if err != nil {
			return nil, fmt.Errorf("open segment: %w", err)
		}
		r.mu.file = f
	}
	return r.mu.file, nil
}

// Frame reads the whole frame at offset off. Header and tables are verified;
// the payload is when it is used.
func (r *Reader) Frame(off int64) (*frame.Frame, error) {
	f, err := r.handle()
	if err != nil {
		return nil, err
	}
	h, err := frameHeader(f, off)
	if err != nil {
		return nil, fmt.Errorf("read frame of %s at %d: %w", r.name, off, err)
	}
	return r.parse(f, off, h.Size(), frame.Parse)
}

// Tables reads header and tables of the frame at off, for ReadBlock.
func (r *Reader) Tables(off int64) (*frame.Frame, error) {
	f, err := r.handle()
	if err != nil {
		return nil, err
	}
	h, err := frameHeader(f, off)
	if err != nil {
		return nil, fmt.Errorf("read frame of %s at %d: %w", r.name, off, err)
	}
	return r.parse(f, off, int64(h.TablesSize()), frame.ParseTables)
}

func (r *Reader) parse(f io.ReaderAt, off, n int64, parse func([]byte) (*frame.Frame, error)) (*frame.Frame, error) {
	b := make([]byte, n)
	err := readFull(f, b, off)
	if err == nil {
		var fr *frame.Frame
		if fr, err = parse(b); err == nil {
			return fr, nil
		}
	}
	return nil, fmt.Errorf("read frame of %s at %d: %w", r.name, off, err)
}

func frameHeader(f io.ReaderAt, off int64) (frame.Header, error) {
	var b [frame.HeaderSize]byte
	if off < headerSize {
		return frame.Header{}, fmt.Errorf("offset %d: %w", off, dr.ErrInvalid)
	}
	if err := readFull(f, b[:], off); err != nil {
		return frame.Header{}, err
	}
	return frame.ParseHeader(b[:])
}

// ReadBlock reads, verifies and decodes block i of the frame at off, of which
// fr came from Tables or Frame, and appends it to dst.
func (r *Reader) ReadBlock(fr *frame.Frame, off int64, i int, dst []byte) ([]byte, error) {
	f, err := r.handle()
	if err != nil {
		return nil, err
	}
	at, n, _, _ := fr.Block(i)
	stored := make([]byte, n)
	if err := readFull(f, stored, off+at); err != nil {
		return nil, fmt.Errorf("read block of %s: %w", r.name, err)
	}
	if dst, err = fr.DecodeBlock(i, stored, dst); err != nil {
		return nil, fmt.Errorf("read block of %s, frame at %d: %w", r.name, off, err)
	}
	return dst, nil
}

// ReadRaw fills p with the file's bytes at off, which are not verified: for
// callers that have verified the block around them before.
func (r *Reader) ReadRaw(p []byte, off int64) error {
	f, err := r.handle()
	if err != nil {
		return err
	}
	if err := readFull(f, p, off); err != nil {
		return fmt.Errorf("read %s: %w", r.name, err)
	}
	return nil
}

// Check reads everything and proves it: each frame, checksum and continuity,
// the hash chain from the start, the index, and that nothing else lies in
// between. Torn bytes at the end are an error too.
func (r *Reader) Check(ctx context.Context) error {
	at, c := int64(headerSize), r.start
	f, err := r.handle()
	if err != nil {
		return err
	}
	for _, e := range r.Entries() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := checkEntry(f, e, at); err != nil {
			return fmt.Errorf("segment %s at %d: %w", r.name, e.Off, err)
		}
		fr, err := r.Frame(e.Off)
		if err != nil {
			return err
		}
		if err := errors.Join(fr.Check(c), fr.VerifyChain(c.Chain)); err != nil {
			return fmt.Errorf("segment %s at %d: %w", r.name, e.Off, err)
		}
		if entryOf(e.Off, &fr.Header) != e {
			return fmt.Errorf("segment %s at %d: index differs from frame: %w", r.name, e.Off, dr.ErrCorrupt)
		}
		at, c = e.Off+e.Len, fr.End()
	}
	if end := r.End(); c != end {
		return fmt.Errorf("segment %s ends at %v, its trailer says %v: %w", r.name, c.Position, end.Position, dr.ErrCorrupt)
	}
	if torn := r.Torn(); torn > 0 {
		return fmt.Errorf("segment %s: %d bytes behind the last frame, at %d, are of no use: %w", r.name, torn, at, dr.ErrCorrupt)
	}
	return nil
}

// checkEntry checks that e follows what ends at at, with at most a mark between.
func checkEntry(f io.ReaderAt, e Entry, at int64) error {
	if e.Off == at {
		return nil
	}
	var b [markSize]byte
	if err := readFull(f, b[:], at); err != nil {
		return err
	}
	if _, ok := parseMark(b[:], at); !ok || e.Off != at+markSize {
		return fmt.Errorf("no frame and no sync mark at %d: %w", at, dr.ErrCorrupt)
	}
	return nil
}

// Moved says that the file has another name now, in the same directory.
func (r *Reader) Moved(base string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.name = path.Join(path.Dir(r.name), base)
	f := r.mu.file
	if r.mu.file = nil; f == nil {
		return nil
	}
	return f.Close()
}

// Close releases the file. The Reader may be used no more.
func (r *Reader) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.mu.file
	if r.mu.file = nil; f == nil {
		return nil
	}
	return f.Close()
}
