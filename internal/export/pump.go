package export

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"

	"farside/internal/nbd"
)

const (
	unit    = 64 << 10 // granularity of holes in images; a qcow2 cluster
	piece   = 1 << 20  // most that is read at once
	window  = 64 << 20 // what the source is asked for its map at once
	readers = 4        // pieces that are read at once
)

// job is a run of units that hold data, as the map says.
type job struct {
	off  int64
	data []byte
	err  error
	done chan struct{} // closed by its reader
}

// pump reads src from the unit at from on. It calls data, in order, with runs
// of units that are not all zeroes; the rest of the disk is. It calls passed
// with the offset up to which it is through. Both run in the caller's goroutine.
func pump(ctx context.Context, src Source, from int64, data func(off int64, p []byte) error, passed func(off int64)) error {
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	todo := make(chan *job)
	order := make(chan *job, 2*readers)
	var walkErr error // set before order is closed
	work.Go(func() {
		defer close(order)
		defer close(todo)
		walkErr = walk(ctx, src, from, func(j *job) error {
			for _, to := range []chan *job{order, todo} {
				select {
				case to <- j:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return nil
		})
	})
	for range readers {
		work.Go(func() {
			for j := range todo {
				j.read(src)
			}
		})
	}
	for j := range order {
		select {
		case <-j.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		if j.err != nil {
			return fmt.Errorf("read disk at %d: %w", j.off, j.err)
		}
		if err := j.split(data); err != nil {
			return err
		}
		passed(j.off + int64(len(j.data)))
	}
	return walkErr
}

func (j *job) read(src Source) {
	defer close(j.done)
	n, err := src.ReadAt(j.data, j.off)
	if n < len(j.data) {
		if j.err = err; err == nil {
			j.err = io.ErrUnexpectedEOF
		}
	}
}

// split calls data for each run of units that are not zero.
func (j *job) split(data func(off int64, p []byte) error) error {
	var zeroes [unit]byte
	for at := 0; at < len(j.data); {
		end := at
		for end < len(j.data) && !bytes.Equal(j.data[end:min(end+unit, len(j.data))], zeroes[:min(unit, len(j.data)-end)]) {
			end = min(end+unit, len(j.data))
		}
		if end > at {
			if err := data(j.off+int64(at), j.data[at:end]); err != nil {
				return err
			}
		}
		at = end + unit
	}
	return nil
}

// walk gives the runs of units that may hold data to emit, in order.
func walk(ctx context.Context, src Source, from int64, emit func(*job) error) error {
	size := src.Size()
	for off := from / window * window; off < size; off += window {
		end := min(off+window, size)
		used, err := usedUnits(src, off, end)
		if err != nil {
			return fmt.Errorf("map disk at %d: %w", off, err)
		}
		if err := ctx.Err(); err != nil {
			return err // also where all is holes
		}
		for at := max(off, from/unit*unit); at < end; {
			next := at
			for next < end && next-at < piece && used[(next-off)/unit] {
				next = min(next+unit, end)
			}
			if next == at {
				at += unit
				continue
			}
			if err := emit(&job{off: at, data: make([]byte, next-at), done: make(chan struct{})}); err != nil {
				return err
			}
			at = next
		}
	}
	return nil
}

// usedUnits tells which units of [off, end) the map doesn't call zero.
func usedUnits(src Source, off, end int64) ([]bool, error) {
	used := make([]bool, (end-off+unit-1)/unit)
	m, ok := src.(nbd.Mapper)
	if !ok {
		for i := range used {
			used[i] = true
		}
		return used, nil
	}
	err := m.Map(off, end-off, func(at, n int64, zero, _ bool) error {
		if !zero {
			for u := (at - off) / unit; u*unit < min(at+n, end)-off; u++ {
				used[u] = true
			}
		}
		return nil
	})
	return used, err
}
