package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"farside/internal/blockdev"
	"farside/internal/capture"
	"farside/internal/dr"
)

// recordFile is what an agent leaves on disk for the next one. It decides nothing about what is
// sent: a capture that goes on proves itself (ledger), and any other begins with a comparison.
// It says why, and which copies were whole.
const recordFile = "capture.json"

const (
	recordVersion = 2 // the first had no number, no disks
	maxRecord     = 64 << 10
	maxRecorded   = 256 // disks
)

// left is the content of that file.
type left struct {
	Version int        `json:"version"`
	Boot    string     `json:"boot"`  // id of the boot in which the agent ran
	Ended   bool       `json:"ended"` // the agent was asked to end and did
	Disks   []leftDisk `json:"disks,omitempty"`
}

// leftDisk is a protected disk as the agent saw it last.
type leftDisk struct {
	ID       dr.DiskID `json:"id"`
	Path     string    `json:"path"`
	Identity string    `json:"identity,omitempty"` // see blockdev.Identity.Stable
	Seq      uint64    `json:"seq,omitempty"`      // the kernel's number of its medium in that boot
	Size     int64     `json:"size,omitempty"`     // bytes
	Written  *uint64   `json:"written,omitempty"`  // bytes that the kernel had counted when the agent ended in order
	Whole    bool      `json:"whole,omitempty"`    // its copy is a state that it was in
}

// parseLeft reads the file. Whatever is in it, what it returns can be used; the error wraps dr.ErrCorrupt, or
// dr.ErrUnsupported if a later version wrote it.
func parseLeft(b []byte) (*left, error) {
	if len(b) > maxRecord {
		return nil, fmt.Errorf("record of %d bytes: %w", len(b), dr.ErrCorrupt)
	}
	l := &left{}
	if err := json.Unmarshal(b, l); err != nil {
		return nil, fmt.Errorf("record: %w: %w", err, dr.ErrCorrupt)
	}
	switch {
	case l.Version > recordVersion:
		return nil, fmt.Errorf("record of version %d: %w", l.Version, dr.ErrUnsupported)
	case l.Version < 0 || len(l.Boot) > 256 || len(l.Disks) > maxRecorded:
		return nil, fmt.Errorf("record of version %d, %d disks: %w", l.Version, len(l.Disks), dr.ErrCorrupt)
	}
	for i, d := range l.Disks {
		if d.Size < 0 || len(d.Path)+len(d.Identity) > 4096 || slices.ContainsFunc(l.Disks[:i], func(x leftDisk) bool { return x.ID == d.ID }) {
			return nil, fmt.Errorf("record of disk %d: %w", d.ID, dr.ErrCorrupt)
		}
	}
	return l, nil
}

// keeper keeps small files; see control.Client.
type keeper interface {
	Keep(name string, content []byte) error
	Kept(name string) ([]byte, error)
}

// record keeps the file. It is safe for concurrent use.
type record struct {
	keeper  keeper
	log     *slog.Logger
	written func(path string) (uint64, bool) // what the kernel counted

	mu struct {
		sync.Mutex
		left
	}
}

// newRecord is for an agent that begins in a boot.
func newRecord(k keeper, boot string, log *slog.Logger, written func(path string) (uint64, bool)) *record {
	r := &record{keeper: k, log: log, written: written}
	r.mu.left = left{Version: recordVersion, Boot: boot}
	return r
}

// begin tells why a comparison would begin now, notes that this agent runs, and returns the disks whose copies are
// states that they were in.
func (r *record) begin(m *blockdev.Machine) (why aftermath, whole map[dr.DiskID]bool) {
	last := r.last()
	r.mu.Lock()
	defer r.mu.Unlock()
	why = explain(last, r.mu.Boot, m, r.written)
	whole = make(map[dr.DiskID]bool)
	if last != nil {
		r.mu.Disks = slices.Clone(last.Disks)
	}
	for i := range r.mu.Disks {
		r.mu.Disks[i].Written = nil
		whole[r.mu.Disks[i].ID] = r.mu.Disks[i].Whole
	}
	r.saveLocked()
	return why, whole
}

func (r *record) last() *left {
	b, err := r.keeper.Kept(recordFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var last *left
	if err == nil {
		last, err = parseLeft(b)
	}
	if err != nil {
		r.log.Warn("what the agent before left can't be read; the disks are compared anyway if need be", "error", err)
		return nil
	}
	return last
}

// note notes the protected disks: where they are, as far as is known, and whose copies are whole. It is written only if
// that is news.
func (r *record) note(disks []capture.Disk, known map[dr.DiskID]blockdev.Device, whole map[dr.DiskID]bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var now []leftDisk
	for _, d := range disks {
		x := leftDisk{ID: d.ID, Path: d.Path, Size: d.Size}
		if i := slices.IndexFunc(r.mu.Disks, func(o leftDisk) bool { return o.ID == d.ID }); i >= 0 {
			x = r.mu.Disks[i]
		}
		if k, ok := known[d.ID]; ok {
			x.Path, x.Identity, x.Seq, x.Size = k.Path, k.Stable(), k.DiskSeq, k.Size
		}
		x.Whole = whole[d.ID]
		now = append(now, x)
	}
	if !slices.Equal(now, r.mu.Disks) {
		r.mu.Disks = now
		r.saveLocked()
	}
}

// ended notes that the agent ended in order, and what the kernel had counted then.
func (r *record) ended() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.Ended = true
	for i := range r.mu.Disks {
		if n, ok := r.written(r.mu.Disks[i].Path); ok {
			r.mu.Disks[i].Written = &n
		}
	}
	r.saveLocked()
}

func (r *record) saveLocked() {
	b, err := json.Marshal(r.mu.left)
	if err == nil {
		err = r.keeper.Keep(recordFile, append(b, '\n'))
	}
	if err != nil {
		r.log.Warn("the reason of the next comparison may be told wrong", "error", err)
	}
}

// keepRecord notes what is to be known after a restart, if it is news.
func (a *agent) keepRecord(w *work) {
	if a.record == nil {
		return
	}
	a.mu.Lock()
	known, whole := maps.Clone(a.devices.known), maps.Clone(a.devices.whole)
	a.mu.Unlock()
	a.record.note(w.disks, known, whole)
}

// recall takes over what the agent before this one left, and tells it.
func (a *agent) recall(r *record) {
	m := a.scan()
	why, whole := r.begin(&m)
	a.record, a.first, a.devices.whole = r, why.reason, whole
	a.tell([]notice{{"agent-start", false, "the agent started: " + why.text, a.now()}})
}
