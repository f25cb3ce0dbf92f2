package spool

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

// failing is a file system of which some calls that change something fail.
func failing(mem *vfs.Mem, from, n int) (fsys vfs.FS, calls func() int) {
	made := 0
	return vfs.NewFault(mem, func(op vfs.Op) error {
		if !op.Kind.Changes() {
			return nil
		}
		made++
		if made <= from || made > from+n {
			return nil
		}
		if op.Kind == vfs.OpWrite && made%2 == 0 {
			return &vfs.ShortWrite{N: op.Len / 2, Err: syscall.ENOSPC}
		}
		return syscall.ENOSPC
	}), func() int { return made }
}

// A user of the spool that starts over from Cursor after each error, as a link
// does, loses nothing that was synced and comes to the end by itself, whichever calls fail,
// once or for a while; and what a power cut leaves then is right too.
func TestHealsAfterFailuresOfTheDisk(t *testing.T) {
	all := stream(origin, 20)
	for _, n := range []int{1, 2, 9} {
		for from := 1; ; from++ {
			mem := vfs.NewMem()
			must(0, errors.Join(mem.MkdirAll("/spool"), mem.SyncDir("/")))
			fsys, calls := failing(mem, from, n)
			if err := fillFailing(fsys, all); err != nil {
				t.Fatalf("%d failures from call %d: %v", n, from, err)
			}
			after := open(t, mem.Crash(uint64(from)), Options{SegmentSize: 2500})
			if c, _ := after.Cursor(); c != all[len(all)-1].End() {
				t.Fatalf("%d failures from call %d: cursor %v after a power cut", n, from, c.Position)
			}
			if calls() < from {
				break
			}
		}
	}
}

func fillFailing(fsys vfs.FS, all []*frame.Frame) error {
	s, err := Open(fsys, "/spool/m", Options{SegmentSize: 2500})
	for try := 0; err != nil; try++ {
		if try > 20 {
			return fmt.Errorf("open: %w", err)
		}
		s, err = Open(fsys, "/spool/m", Options{SegmentSize: 2500})
	}
	defer s.Close()
	for try := 0; ; try++ {
		if err := s.Reset(origin); err == nil {
			break
		} else if try > 20 {
			return fmt.Errorf("reset: %w", err)
		}
	}
	r, err := s.ReadFrom(origin)
	if err != nil {
		return err
	}
	read, synced := 0, 0
	for tries := 0; ; tries++ {
		if tries > 60 {
			return errors.New("it does not heal")
		}
		if err := s.Sync(); err != nil {
			continue
		}
		c, _ := s.Cursor()
		have := int(c.Position.Seq - origin.Position.Seq)
		if have < synced {
			return fmt.Errorf("%d frames of %d synced: %w", have, synced, dr.ErrGap)
		}
		if have == len(all) && s.Synced() == c {
			break
		}
		fillOnce(s, all, have, &synced)
		for ; read < synced; read++ {
			f, err := r.Next(context.Background())
			if err != nil {
				return err
			}
			if f.Chain != all[read].Chain {
				return fmt.Errorf("frame %d is another one", read)
			}
		}
		if read > 0 {
			_ = s.Trim(all[read-1].Last) // it tries again with the next
		}
	}
	for ; read < len(all); read++ {
		f, err := r.Next(context.Background())
		if err != nil || f.Chain != all[read].Chain {
			return fmt.Errorf("frame %d: %w", read, err)
		}
	}
	return nil
}

// fillOnce appends from have on until something fails.
func fillOnce(s *Spool, all []*frame.Frame, have int, synced *int) {
	for i := have; i < len(all); i += 2 {
		if s.Append(context.Background(), all[i:min(i+2, len(all))]) != nil {
			return
		}
		if i%4 == 2 {
			continue
		}
		if s.Sync() != nil {
			return
		}
		*synced = min(i+2, len(all))
	}
}
