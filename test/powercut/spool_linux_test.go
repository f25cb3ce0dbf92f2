package powercut

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
	"farside/internal/demo/stage"
	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
	"farside/internal/spool"
	"farside/internal/vfs"
)

// TestSpool: while there is no master target, whenever the power goes, the process server's spool opens and holds what the agent had been
// told is stored.
func TestSpool(t *testing.T) {
	c := deploy(t, "process-server", false)
	c.stored(images(5))
	for _, err := range c.judge(images(20), c.spool) {
		t.Error(err)
	}
	if c.most == 0 {
		t.Error("no state held anything of the load")
	}
}

// TestSpoolUnsynced: with a process server whose fsync does nothing the same judgement finds losses.
func TestSpoolUnsynced(t *testing.T) {
	c := deploy(t, "process-server", true)
	c.stored(5)
	bad := c.judge(10, c.spool)
	if len(bad) == 0 {
		t.Fatal("nobody noticed that fsync does nothing")
	}
	t.Logf("%d of 10 power cuts are found to lose something, as %v", len(bad), bad[0])
}

// stored writes n times until the agent has been told that more is stored.
func (c *cut) stored(n int) {
	c.t.Helper()
	if err := c.stage.Halt("master-target", true); err != nil {
		c.t.Fatal(err)
	}
	reports, err := catalog.Open(c.t.Context(), filepath.Join(c.dir, "config-server", "catalog.db"))
	if err != nil {
		c.t.Fatal(err)
	}
	defer reports.Close()
	last := uint64(0)
	for range n {
		c.write(20 + c.rng.IntN(100))
		err := stage.Poll(c.t.Context(), time.Minute, "wait until more is stored", func(ctx context.Context) (bool, error) {
			at, err := storedAt(ctx, reports)
			if err != nil || at <= last {
				return false, err
			}
			last = at
			return true, nil
		})
		if err != nil {
			c.t.Fatal(err)
		}
		c.acks = append(c.acks, ack{at: c.log.Len(), seq: last})
	}
	c.write(200)
}

// storedAt returns the sequence number up to which the agent reports to have been told that its changes are stored.
func storedAt(ctx context.Context, from *catalog.Catalog) (at uint64, err error) {
	err = from.Read(ctx, func(tx *catalog.Tx) error {
		rows, err := tx.Reports()
		if err != nil {
			return err
		}
		for _, row := range rows {
			var r farsidev1.Report
			if err := proto.Unmarshal(row.Body, &r); err != nil {
				return err
			}
			at = max(at, r.GetAgent().GetStored().GetSeq())
		}
		return nil
	})
	return at, err
}

// spool judges a process server's directory: it opens the spool as it does itself when it starts, and reads all of it.
func (c *cut) spool(dir string, seen []ack) error {
	found, err := filepath.Glob(filepath.Join(dir, "spool", "*", "PROMISED"))
	if err != nil || len(found) != 1 {
		return fmt.Errorf("%d spools: %w", len(found), errors.Join(err, errors.New("there must be one")))
	}
	at := filepath.Dir(found[0])
	s, err := spool.Open(vfs.OS(), at, spool.Options{})
	if err != nil {
		return err
	}
	end := s.Synced().Position.Seq
	lost, isLost := s.Lost()
	if err := s.Close(); err != nil {
		return err
	}
	if isLost {
		return fmt.Errorf("the spool says that it lost what was stored up to %v", lost)
	}
	if want := seen[len(seen)-1].seq; uint64(end) < want {
		return fmt.Errorf("ends at %d, %d was stored", end, want)
	}
	m, err := readSpool(at)
	if err != nil {
		return err
	}
	n, err := c.prefix(func(p []byte, off int64) error { m.ReadAt(p, off); return nil })
	c.most = max(c.most, n)
	return err
}

// readSpool verifies each frame of a spool's segments and applies it to a disk of zeros, which the protected one was.
func readSpool(dir string) (*Image, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.seg"))
	if err != nil || len(names) == 0 {
		return nil, fmt.Errorf("%d segments: %w", len(names), errors.Join(err, dr.ErrNotFound))
	}
	m := NewImage()
	var next frame.Cursor
	for i, name := range names {
		r, err := segment.Open(vfs.OS(), dir, filepath.Base(name))
		if err != nil {
			return nil, err
		}
		if i > 0 && r.Start() != next {
			err = fmt.Errorf("%s doesn't continue the one before: %w", name, dr.ErrGap)
		}
		for _, e := range r.Entries() {
			if err == nil {
				err = applyFrame(m, r, e.Off)
			}
		}
		next = r.End()
		if err := errors.Join(err, r.Close()); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func applyFrame(m *Image, r *segment.Reader, off int64) error {
	f, err := r.Frame(off)
	if err != nil {
		return err
	}
	data, err := f.Payload(nil)
	if err != nil {
		return err
	}
	for _, x := range f.All() {
		if x.What == dr.Data {
			m.WriteAt(data[x.RawOff:int64(x.RawOff)+x.Length], x.Offset)
		} else {
			m.Zero(x.Offset, x.Length)
		}
	}
	return nil
}
