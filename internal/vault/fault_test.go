package vault

import (
	"context"
	"errors"
	"flag"
	"strings"
	"sync/atomic"
	"testing"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

var errInjected = errors.New("injected")

// faults counts the calls that change something and fails some of them.
type faults struct {
	calls atomic.Int64
	at    int64 // the call that fails first; 0: none
	once  bool  // only that one
	short bool  // half of a write gets through
}

func (f *faults) inject(o vfs.Op) error {
	if !o.Kind.Changes() && o.Kind != vfs.OpRead {
		return nil
	}
	n := f.calls.Add(1)
	if f.at == 0 || n < f.at || f.once && n > f.at {
		return nil
	}
	if f.short && o.Kind == vfs.OpWrite {
		return &vfs.ShortWrite{N: o.Len / 2, Err: errInjected}
	}
	return errInjected
}

// work drives a vault through all it does, until the first error. It notes
// what was synced and what the horizon may have become.
func (m *model) work(ctx context.Context) error {
	for round := range 3 {
		for range 4 {
			for range 4 {
				f := m.src.anything()
				if err := m.v.Log().Append(f); err != nil {
					return err
				}
				m.o.add(f)
			}
			c, err := m.v.Log().Sync()
			if err != nil {
				return err
			}
			m.synced = c.Position.Seq
			if m.acked != nil {
				<-m.acked
				m.acked <- m.synced
			}
		}
		if _, err := m.v.FoldTo(ctx, m.src.now-2000); err != nil {
			return err
		}
		if round == 0 {
			continue
		}
		if err := m.workBranch(); err != nil {
			return err
		}
	}
	return nil
}

func (m *model) workBranch() error {
	p, err := m.v.Resolve(SelectLatest())
	if err != nil {
		return err
	}
	b, err := m.v.NewBranch(p.Position, 0)
	if err != nil {
		return err
	}
	src := newSource(uint64(p.Position.Seq), b.Cursor())
	err = b.Apply([]*frame.Frame{src.frame(frame.Changes, dr.Exact, false, 3)})
	b.Close()
	if err != nil {
		return err
	}
	return m.v.DiscardBranch(b.Timeline())
}

var thorough = flag.Bool("thorough", false, "fail and crash ten times as many calls")

// effort returns how much to do: with -thorough, as usual, and with -short.
func effort(most, usual, least int64) int64 {
	switch {
	case *thorough:
		return most
	case testing.Short():
		return least
	}
	return usual
}

// TestFaults fails calls to the file system all over a vault's work, once or from then on, and shows that the error is told and that
// what was synced is there and right after opening again; a log that failed
// once goes on after Resume.
func TestFaults(t *testing.T) {
	t.Parallel()
	count := &faults{}
	faultRound(t, count)
	total := count.calls.Load()
	step := total / effort(300, 30, 10)
	for at := int64(1); at <= total; at += step {
		faultRound(t, &faults{at: at, once: at%2 == 0, short: at%3 == 0})
		if t.Failed() {
			return
		}
	}
	t.Logf("%d calls", total)
}

func faultRound(t *testing.T, f *faults) {
	m := newModel(t, 11)
	m.close(t)
	m.opts.SegmentSize = 100 << 10
	v, err := Open(context.Background(), vfs.NewFault(m.mem, f.inject), "/vaults/m", m.opts)
	if err == nil {
		m.v = v
		m.src = newSource(11, v.Log().Cursor())
		err = m.work(context.Background())
		if err != nil && f.once {
			m.resume(t, err)
		}
		if err := v.Close(); err != nil && f.at == 0 {
			t.Errorf("close: %v", err)
		}
	}
	if f.at == 0 && err != nil || err != nil && !told(err) {
		t.Errorf("fault at %d: %v", f.at, err)
	}
	m.reopened(t, 12)
	m.append(t, 3)
	m.sync(t)
	for seq := m.synced; seq > 0 && seq > m.synced-200; seq -= 17 {
		m.checkPosition(t, seq)
	}
	m.discard(t)
	if _, err := m.v.FoldTo(context.Background(), m.src.now); err != nil {
		t.Errorf("fold after fault at %d: %v", f.at, err)
	}
	m.checkPosition(t, m.horizon())
	m.close(t)
	m.prove(t)
}

// told reports whether an error comes from the fault; a read that failed may
// be taken for damage.
func told(err error) bool {
	return errors.Is(err, errInjected) || strings.Contains(err.Error(), errInjected.Error())
}

// resume goes on after a fault that is over.
func (m *model) resume(t *testing.T, cause error) {
	c, err := m.v.Log().Resume()
	if err != nil {
		if !strings.Contains(err.Error(), "must be opened again") {
			t.Errorf("resume after %v: %v", cause, err)
		}
		return
	}
	if c.Position.Seq < m.synced {
		t.Errorf("resume after %v: at %d, synced through %d", cause, c.Position.Seq, m.synced)
	}
	m.o.truncate(c.Position.Seq)
	m.src = newSource(99, c)
	m.append(t, 4)
	if c, err = m.v.Log().Sync(); err != nil {
		// Pebble works in the background: the fault may have hit it only now, and then it is told here.
		if !told(err) {
			t.Errorf("sync after resume: %v", err)
		}
		return
	}
	m.synced = c.Position.Seq
	m.checkPosition(t, m.synced)
}
