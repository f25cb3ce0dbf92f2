package mastertarget

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/link"
	"farside/internal/vault"
	"farside/internal/vfs"
)

const foldEvery = 30 * time.Second

// wanted is what the assignment says of a machine.
type wanted struct {
	id       dr.MachineID
	timeline dr.Timeline
	disks    []dr.Disk
	writers  []dr.NodeID // process servers that may send the stream
	window   time.Duration
	retired  bool
}

func wantedOf(p *pb.TargetMachine) (wanted, error) {
	id, err := dr.ParseMachineID(p.GetMachineId())
	if err != nil {
		return wanted{}, err
	}
	w := wanted{
		id: id, timeline: dr.Timeline(p.GetTimeline()), retired: p.GetRetired(),
		window: time.Duration(p.GetHistoryWindowSeconds()) * time.Second,
	}
	for _, d := range p.GetDisks() {
		if d.GetId() > 1<<16-1 {
			return wanted{}, fmt.Errorf("disk id %d of machine %v: %w", d.GetId(), id, dr.ErrInvalid)
		}
		w.disks = append(w.disks, dr.Disk{ID: dr.DiskID(d.GetId()), Size: d.GetSize(), Name: d.GetPath()})
	}
	for _, s := range p.GetWriters() {
		n, err := dr.ParseNodeID(s)
		if err != nil {
			return wanted{}, err
		}
		w.writers = append(w.writers, n)
	}
	return w, nil
}

// sameStream reports whether a connection that w let in may stay under o.
func (w wanted) sameStream(o wanted) bool {
	return w.timeline == o.timeline && w.retired == o.retired && slices.Equal(w.writers, o.writers)
}

// machine is a vault with its stream.
type machine struct {
	vault *vault.Vault
	log   *slog.Logger
	folds sync.WaitGroup
	hash  chan struct{} // has room for as many as may read and hash at a time, of all machines
	stop  context.CancelFunc

	frames, bytes atomic.Int64 // received since the start

	mu struct {
		sync.Mutex
		wanted  wanted
		err     error // of the stream or of folding; nil when it goes well
		broken  bool  // the vault must be opened again
		history history
	}
}

// openMachine opens the vault of a machine, or makes it, and begins to fold.
func openMachine(ctx context.Context, fsys vfs.FS, dir string, o vault.Options, w wanted, hash chan struct{}, log *slog.Logger) (*machine, error) {
	v, err := vault.Open(ctx, fsys, dir, o)
	if errors.Is(err, dr.ErrNotFound) {
		v, err = vault.Create(fsys, dir, w.id, nil, o)
	}
	if err != nil {
		return nil, err
	}
	if v.Machine() != w.id {
		return nil, errors.Join(fmt.Errorf("vault %s is that of machine %v: %w", dir, v.Machine(), dr.ErrCorrupt), v.Close())
	}
	m := &machine{vault: v, hash: hash, log: log.With("machine", w.id)}
	for _, lost := range v.Lost() {
		m.log.Error("the vault is older than it was; the machine sends again what is missing", "error", lost)
	}
	m.mu.wanted = w
	ctx, m.stop = context.WithCancel(ctx)
	m.folds.Go(func() { m.fold(ctx) })
	return m, nil
}

// close ends folding and closes the vault; no stream and no view uses it any more.
func (m *machine) close() {
	m.stop()
	m.folds.Wait()
	if err := m.vault.Close(); err != nil {
		m.log.Error("close vault", "error", err)
	}
}

// assign takes a newer assignment; drop reports whether connections that the
// old one let in must go.
func (m *machine) assign(w wanted) (drop bool, err error) {
	var errs []error
	for _, d := range w.disks {
		errs = append(errs, m.vault.AddDisk(d))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	drop = !m.mu.wanted.sameStream(w)
	m.mu.wanted = w
	return drop, errors.Join(errs...)
}

func (m *machine) wanted() wanted {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.wanted
}

// failed notes what is wrong, for the report, and returns it.
func (m *machine) failed(err error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.err = err
	return err
}

// usable reports whether the vault needs no reopening; that of no machine is not.
func (m *machine) usable() bool {
	if m == nil {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.mu.broken
}

// fold folds what has left the window, until ctx ends. The window ends at the
// newest change and not now: the past of a machine that has stopped stays.
func (m *machine) fold(ctx context.Context) {
	tick := time.NewTicker(foldEvery)
	defer tick.Stop()
	for {
		n, err := m.vault.FoldTo(ctx, m.vault.Head().Time-int64(m.wanted().window))
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			m.log.Error("fold history", "error", m.failed(err))
		case n > 0:
			at, _ := m.vault.Horizon()
			m.log.Info("folded history", "segments", n, "horizon", at)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// open is the link.Open of the machine's stream.
func (m *machine) open(h link.Hello) (link.Sink, error) {
	if current := m.vault.Timeline(); h.Timeline != current {
		return nil, fmt.Errorf("stream of timeline %d, current is %d: %w", h.Timeline, current, dr.ErrTimeline)
	}
	log := m.vault.Log()
	at, err := log.Resume()
	if err == nil {
		at, err = log.Sync() // so that all that the welcome claims is durable
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.err = err; err != nil {
		m.mu.broken = true
		return nil, fmt.Errorf("%w: %w", dr.ErrUnavailable, err)
	}
	return &sink{m, at, link.NewProgress(link.Ack{Stored: at.Position.Seq, Durable: at.Position.Seq})}, nil
}

var _ link.CallSink = (*sink)(nil)

// sink takes a stream's frames into the vault.
type sink struct {
	m        *machine
	at       frame.Cursor // when it was opened
	progress *link.Progress
}

// Cursor implements link.Sink.
func (k *sink) Cursor() frame.Cursor { return k.at }

// Progress implements link.Sink.
func (k *sink) Progress() *link.Progress { return k.progress }

// Append implements link.Sink.
func (k *sink) Append(ctx context.Context, frames []*frame.Frame) error {
	for _, f := range frames {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := k.m.vault.Log().Append(f); err != nil {
			return k.m.failed(err)
		}
		k.m.frames.Add(1)
		k.m.bytes.Add(f.Size())
	}
	return nil
}

// Sync implements link.Sink.
func (k *sink) Sync() error {
	c, err := k.m.vault.Log().Sync()
	if err != nil {
		return k.m.failed(err)
	}
	k.progress.Raise(c.Position.Seq, c.Position.Seq)
	return nil
}
