// Package view opens a machine's disks as they were at a recovery point: read
// only, or writable on a private branch of the machine's history.
//
// Main types: View, all disks at a position; Disk, one of them, with the
// methods that a block server wants. A writable view keeps what is written in
// memory until Flush, which appends it to the branch as frames, fsyncs and
// indexes it; reads see it at once. A branch survives Close and is opened again
// by its timeline, or removed by Discard.
//
// The package chooses no recovery point (vault.Resolve does), serves nothing
// over a network (package export does), and merges no branch into anything.
//
// View and Disk are safe for concurrent use. Writes that overlap and are in
// flight together end up in either order. The package starts no goroutine.
package view

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vault"
)

// maxLayer is how many bytes of writes are kept in memory before a write
// flushes them by itself.
const maxLayer = 16 << 20

// View is all disks of a machine at a position.
type View struct {
	vault  *vault.Vault
	state  *vault.State
	branch *vault.Branch // nil: read only

	flushing sync.Mutex // one flush at a time

	mu struct {
		sync.RWMutex
		encoder *frame.Encoder
		current *layer // what was written since the last flush began
		frozen  *layer // what is being flushed, or nil
		failed  error  // a flush failed: no more writes
		closed  bool
	}
}

// Open opens a recovery point, read only. Errors wrap dr.ErrNoPoint.
func Open(v *vault.Vault, p dr.Position) (*View, error) {
	s, err := v.At(p)
	if err != nil {
		return nil, err
	}
	return &View{vault: v, state: s}, nil
}

// OpenWritable opens a recovery point on a new branch with the number tl, which
// the vault has not seen before; 0 lets the vault choose. Errors wrap dr.ErrNoPoint
// or dr.ErrInvalid.
func OpenWritable(v *vault.Vault, p dr.Position, tl dr.Timeline) (*View, error) {
	b, err := v.NewBranch(p, tl)
	if err != nil {
		return nil, err
	}
	return onBranch(v, b), nil
}

// Reopen opens a branch again, with all that was flushed to it. Errors wrap
// dr.ErrNotFound.
func Reopen(v *vault.Vault, tl dr.Timeline) (*View, error) {
	b, err := v.OpenBranch(tl)
	if err != nil {
		return nil, err
	}
	return onBranch(v, b), nil
}

func onBranch(v *vault.Vault, b *vault.Branch) *View {
	w := &View{vault: v, state: b.State(), branch: b}
	w.mu.encoder = frame.NewEncoder(b.Cursor(), frame.S2)
	w.mu.current = newLayer()
	return w
}

// Point returns the position of the view; for a writable one, where the branch
// stood when it was opened.
func (w *View) Point() dr.RecoveryPoint { return w.state.Point() }

// Timeline returns the branch's timeline, or that of the position.
func (w *View) Timeline() dr.Timeline { return w.Point().Position.Timeline }

// Writable reports whether the view has a branch.
func (w *View) Writable() bool { return w.branch != nil }

// Disks returns the disks of the machine.
func (w *View) Disks() []dr.Disk { return w.vault.Disks() }

// Disk returns a disk of the view. Errors wrap dr.ErrNotFound.
func (w *View) Disk(id dr.DiskID) (*Disk, error) {
	for _, d := range w.vault.Disks() {
		if d.ID == id {
			return &Disk{w, d}, nil
		}
	}
	return nil, fmt.Errorf("open disk %d of machine %v: %w", id, w.vault.Machine(), dr.ErrNotFound)
}

// Close flushes and ends the view. A branch stays in the vault. Nobody may
// use the view's disks any more.
func (w *View) Close() error {
	var err error
	if w.branch != nil {
		err = w.Flush()
	}
	w.release()
	return err
}

// Discard ends the view and removes its branch, flushed or not.
func (w *View) Discard() error {
	w.release()
	if w.branch == nil {
		return nil
	}
	return w.vault.DiscardBranch(w.Timeline())
}

func (w *View) release() {
	w.flushing.Lock() // a flush that is under way ends first
	defer w.flushing.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mu.closed {
		return
	}
	w.mu.closed = true
	w.mu.failed = fmt.Errorf("view is closed: %w", dr.ErrUnavailable)
	if w.branch != nil {
		w.branch.Close()
		return
	}
	w.state.Close()
}

// Flush makes everything durable that was written before. After an error no
// more writes are taken; the branch can be opened again, as of the last good
// Flush.
func (w *View) Flush() error {
	if w.branch == nil {
		return nil
	}
	w.flushing.Lock()
	defer w.flushing.Unlock()
	w.mu.Lock()
	err := w.finishLocked()
	if err == nil {
		err = w.mu.failed
	}
	frozen := w.mu.current
	if err != nil || len(frozen.frames) == 0 {
		w.mu.Unlock()
		return err
	}
	w.mu.frozen, w.mu.current = frozen, newLayer()
	w.mu.Unlock()

	err = w.branch.Apply(frozen.frames)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		// frozen stays, so that reads go on seeing what was written.
		w.mu.failed = fmt.Errorf("flush branch %d: %w", w.Timeline(), err)
		return w.mu.failed
	}
	w.mu.frozen = nil
	return nil
}

// finishLocked moves the frame under construction to the current layer.
func (w *View) finishLocked() error {
	if n, _ := w.mu.encoder.Pending(); n == 0 {
		return nil
	}
	b, err := w.mu.encoder.Finish()
	if err != nil {
		return fmt.Errorf("finish frame: %w", err)
	}
	f, err := frame.Parse(b)
	if err != nil {
		return fmt.Errorf("finish frame: %w", err)
	}
	w.mu.current.frames = append(w.mu.current.frames, f)
	return nil
}

// change takes one change of a disk; data is nil unless what is dr.Data.
func (w *View) change(x dr.Extent, what dr.What, data []byte) error {
	full, err := w.changeLocked(x, what, data)
	if err == nil && full {
		err = w.Flush()
	}
	return err
}

func (w *View) changeLocked(x dr.Extent, what dr.What, data []byte) (full bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mu.failed != nil {
		return false, w.mu.failed
	}
	e := w.mu.encoder
	if n, _ := e.Pending(); n > 0 && !e.Room(len(data)) {
		if err := w.finishLocked(); err != nil {
			return false, err
		}
	}
	if n, _ := e.Pending(); n == 0 {
		e.Begin(frame.Changes, dr.Exact, false)
	}
	if _, err := e.Add(x, what, time.Now().UnixNano(), data); err != nil {
		return false, errors.Join(fmt.Errorf("write: %w", err), w.abandonLocked())
	}
	w.mu.current.put(x, data)
	return w.mu.current.bytes >= maxLayer, nil
}

// abandonLocked ends an empty frame after a refused change.
func (w *View) abandonLocked() error {
	if n, _ := w.mu.encoder.Pending(); n > 0 {
		return nil
	}
	_, err := w.mu.encoder.Finish()
	return err
}
