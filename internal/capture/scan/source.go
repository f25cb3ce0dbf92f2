package scan

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/zeebo/blake3"

	"farside/internal/capture"
	"farside/internal/dr"
)

// Options say how a Source scans. The zero value is good.
type Options struct {
	// Every is the time between the beginnings of two cycles. Default 15 minutes.
	Every time.Duration
	// Rate bounds what passes read, in bytes per second; 0: as fast as it goes.
	Rate int64
	// Tries is how many passes of a cycle may find changes before the scan gives up until the next. Default 3.
	Tries int
	// Memory bounds the tables in memory, in bytes. Default 16 MiB, which is good for 64 GiB of disks.
	Memory int64
	// Dir is a directory for the tables that don't fit into Memory. It must not be on a scanned disk: a
	// pass would find what the table changes. "": Memory is no bound.
	Dir string
}

// The defaults, and what is read at once.
const (
	DefaultEvery  = 15 * time.Minute
	defaultTries  = 3
	defaultMemory = 16 << 20
	chunk         = 1 << 20
)

func (o Options) withDefaults() Options {
	if o.Every <= 0 {
		o.Every = DefaultEvery
	}
	if o.Tries <= 0 {
		o.Tries = defaultTries
	}
	if o.Memory <= 0 {
		o.Memory = defaultMemory
	}
	return o
}

// Source scans some disks. Make it with Open.
type Source struct {
	opts  Options
	disks []*disk
	dirty *capture.Bitmap
	key   []byte

	stop   context.CancelFunc
	kicked chan struct{} // the consumer marked something: scan soon
	done   chan struct{} // closed when nothing scans any more
	closed chan struct{} // closed by Close, or when the Source has failed

	mu struct {
		sync.Mutex
		hasher *blake3.Hasher
		gen    uint64    // rises with each mark, and each read that makes the consumer have something else
		proven time.Time // moment for which the consumer has the content, zero if there is none …
		at     uint64    // … as of this gen
		why    error     // why the last cycle proved nothing
		failed error
		over   bool
		marked uint64
		active time.Time // when the consumer last marked or read something; zero: never
	}
}

var _ capture.Verifier = (*Source)(nil)

// Open opens the disks, for reading only. Their sizes are found, and compared with those given unless these
// are zero. Nothing is dirty at first: the consumer marks everything, or compares. Errors wrap dr.ErrNotFound,
// dr.ErrDenied, dr.ErrInvalid (the size) or dr.ErrUnavailable.
func Open(disks []capture.Disk, o Options) (_ *Source, err error) {
	s := &Source{
		opts: o.withDefaults(), kicked: make(chan struct{}, 1),
		done: make(chan struct{}), closed: make(chan struct{}),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.closeDisks())
		}
	}()
	for _, d := range disks {
		x, err := openDisk(d)
		if err != nil {
			return nil, err
		}
		s.disks = append(s.disks, x)
	}
	if s.dirty, err = capture.NewBitmap(s.Disks(), block, nil); err != nil {
		return nil, err
	}
	if err := s.makeTables(); err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	go s.scan(ctx) // Close waits for it
	return s, nil
}

// makeTables puts the tables of as many disks into memory as may be.
func (s *Source) makeTables() (err error) {
	if s.key, err = newKey(); err != nil {
		return err
	}
	if s.mu.hasher, err = blake3.NewKeyed(s.key); err != nil {
		return err
	}
	room := s.opts.Memory
	for _, d := range s.disks {
		dir := s.opts.Dir
		if need := (d.Size + block - 1) / block * int64(len(sum{})); need <= room {
			dir, room = "", room-need
		}
		if d.sums, err = newTable(dir, d.ID, d.Size); err != nil {
			return err
		}
	}
	return nil
}

// sumOf hashes a block.
func sumOf(h *blake3.Hasher, p []byte) (s sum) {
	h.Reset()
	_, _ = h.Write(p) // never fails
	var full [32]byte
	copy(s[:], h.Sum(full[:0]))
	return s
}

func (s *Source) find(id dr.DiskID) *disk {
	for _, d := range s.disks {
		if d.ID == id {
			return d
		}
	}
	return nil
}

// Disks implements capture.Source.
func (s *Source) Disks() []capture.Disk {
	var out []capture.Disk
	for _, d := range s.disks {
		out = append(out, d.Disk)
	}
	return out
}

// Next implements capture.Stream: it waits, since there are no events.
func (s *Source) Next(ctx context.Context, wait time.Duration, _ func(capture.Event) error) (int, error) {
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	select {
	case <-s.closed:
	case <-timeout.C:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	return 0, s.usable()
}

// usable fails after Close, and when the Source has failed.
func (s *Source) usable() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.mu.failed != nil:
		return fmt.Errorf("scan: %w", s.mu.failed)
	case s.mu.over:
		return fmt.Errorf("scan closed: %w", dr.ErrUnavailable)
	}
	return nil
}

// Tail and Consumed implement capture.Stream: nothing is ever in the stream.
func (s *Source) Tail() uint64 { return 0 }

// Consumed is zero.
func (s *Source) Consumed() uint64 { return 0 }

// Resume answers dr.ErrUnsupported: there is no data mode.
func (s *Source) Resume(context.Context) error {
	return fmt.Errorf("capture data by scanning: %w", dr.ErrUnsupported)
}

// Overflow does nothing: the mode is that of the bitmap already.
func (s *Source) Overflow() {}

// Mark implements capture.DirtySet. It also makes the next cycle begin soon.
func (s *Source) Mark(x dr.Extent) error {
	s.mu.Lock()
	err := s.dirty.Mark(x)
	if err == nil && x.Length > 0 {
		s.mu.gen++
		s.mu.active = time.Now()
	}
	s.mu.Unlock()
	if err == nil {
		select {
		case s.kicked <- struct{}{}:
		default:
		}
	}
	return err
}

// TakeDirty implements capture.DirtySet.
func (s *Source) TakeDirty(limit int64) ([]dr.Extent, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := s.dirty.Take(limit)
	for _, x := range taken {
		d := s.find(x.Disk)
		err := d.blocks(x.Offset, x.Length, func(b int64) error {
			d.taken[b] = struct{}{}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return taken, nil
}

// Dirty implements capture.DirtySet.
func (s *Source) Dirty() (int64, error) { return s.dirty.Dirty(), nil }

// ReadAt implements capture.Source.
func (s *Source) ReadAt(p []byte, id dr.DiskID, off int64) (int, error) {
	d := s.find(id)
	if d == nil {
		return 0, fmt.Errorf("read scanned disk %d: %w", id, dr.ErrNotFound)
	}
	if off < 0 || off > d.Size-int64(len(p)) {
		return 0, fmt.Errorf("read scanned disk %d at %d: %w", id, off, dr.ErrInvalid)
	}
	if err := d.readAny(p, off); err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.active = time.Now()
	err := d.blocks(off, int64(len(p)), func(b int64) error {
		at := b*block - off
		return s.noteLocked(d, b, p[at:at+d.length(b)])
	})
	return len(p), err
}

// noteLocked notes that the consumer has p of block b, if that read counts.
func (s *Source) noteLocked(d *disk, b int64, p []byte) error {
	_, due := d.taken[b]
	if !due {
		if old, err := d.sums.get(b); err != nil || old != (sum{}) {
			return err
		}
	}
	delete(d.taken, b)
	changed, err := d.sums.set(b, sumOf(s.mu.hasher, p))
	if changed {
		s.mu.gen++
	}
	return err
}

// Verify implements capture.Verifier.
func (s *Source) Verify(context.Context) (time.Time, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.mu.failed != nil:
		return time.Time{}, errors.New("scan failed: " + s.mu.failed.Error()) // its kind must not seem to be "ask again"
	case !s.mu.proven.IsZero() && s.mu.at == s.mu.gen && s.settledLocked():
		return s.mu.proven, nil
	case s.mu.why != nil:
		return time.Time{}, s.mu.why
	}
	return time.Time{}, fmt.Errorf("no pass has proven the content yet: %w", dr.ErrUnavailable)
}

// settledLocked reports whether the consumer has read all that was marked.
func (s *Source) settledLocked() bool {
	for _, d := range s.disks {
		if len(d.taken) > 0 {
			return false
		}
	}
	return s.dirty.Dirty() == 0
}

// Stats implements capture.Source.
func (s *Source) Stats() capture.Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := capture.Stats{Mode: capture.ModeBitmap, Marked: s.mu.marked}
	for _, d := range s.disks {
		st.Disks = append(st.Disks, capture.DiskStats{ID: d.ID})
	}
	return st
}

// fail ends the Source.
func (s *Source) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.failed == nil && !s.mu.over {
		s.mu.failed = err
		close(s.closed)
	}
}

// Close implements capture.Source. The tables are gone then.
func (s *Source) Close() error {
	s.mu.Lock()
	over := s.mu.over
	s.mu.over = true
	if !over && s.mu.failed == nil {
		close(s.closed)
	}
	s.mu.Unlock()
	if over {
		return nil
	}
	s.stop()
	<-s.done
	return s.closeDisks()
}

func (s *Source) closeDisks() (err error) {
	for _, d := range s.disks {
		err = errors.Join(err, d.file.Close())
		if d.sums != nil {
			err = errors.Join(err, d.sums.close())
		}
	}
	return err
}
