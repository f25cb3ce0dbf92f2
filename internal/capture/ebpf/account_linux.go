//go:build linux && amd64

package ebpf

import (
	"fmt"
	"sync/atomic"

	"farside/internal/capture"
	"farside/internal/dr"
)

// slack is how much more than the programs saw the kernel may count, bytes, before it is
// certain that changes were missed: completions of writes that began before
// the capture and were not shown to the programs.
const slack = 4 << 20

// takeBaselines remembers where the counters stand while completions run and
// submissions do not yet: from here on each byte that the kernel counts was either
// seen when it was submitted, or is counted as foreign when it completes.
func (s *source) takeBaselines() error {
	for i, d := range s.devs {
		if err := s.takeBaseline(i, d); err != nil {
			return fmt.Errorf("read counters of %s: %w", d.disk.Path, err)
		}
	}
	return nil
}

// takeBaseline reads until nothing completed meanwhile; on a disk that is never calm
// for a moment the last reading must do.
func (s *source) takeBaseline(i int, d *device) (err error) {
	base := &s.notes().Base[i]
	for range 200 {
		before, err := s.count(i)
		if err != nil {
			return err
		}
		if base.Bytes, base.Writes, err = d.written(); err != nil {
			return err
		}
		after, err := s.count(i)
		if err != nil {
			return err
		}
		if base.Foreign = after.ForeignBytes; before.ForeignBytes == after.ForeignBytes {
			return nil
		}
	}
	return nil
}

// count adds up the counters of disk number i over the processors.
func (s *source) count(i int) (sum counters, err error) {
	var perCPU []counters
	if err := s.prog.objs.Counts.Lookup(uint32(i), &perCPU); err != nil {
		return sum, fmt.Errorf("read counters: %w", err)
	}
	for _, c := range perCPU {
		sum.Writes += c.Writes
		sum.Bytes += c.Bytes
		sum.Flushes += c.Flushes
		sum.Marked += c.Marked
		sum.Seen += c.Seen
		sum.SeenBytes += c.SeenBytes
		sum.ForeignBytes += c.ForeignBytes
	}
	return sum, nil
}

// addCounters adds what was counted of disk number i.
func (s *source) addCounters(st *capture.Stats, i int) {
	d, base := s.devs[i], &s.notes().Base[i]
	one := capture.DiskStats{ID: d.disk.ID}
	// The kernel's first: it counts at completion, so it is behind, never ahead.
	bytes, writes, kernelErr := d.written()
	c, err := s.count(i)
	if err == nil {
		st.Writes += c.Writes
		st.Bytes += c.Bytes
		st.Flushes += c.Flushes
		st.Marked += c.Marked
		one.SeenWrites, one.SeenBytes = c.Seen, c.SeenBytes
		if kernelErr == nil {
			foreign := c.ForeignBytes - base.Foreign
			one.KernelBytes, one.KernelWrites = bytes-base.Bytes-min(foreign, bytes-base.Bytes), writes-base.Writes
			s.judge(d, one)
		}
	}
	// Before Linux 5.15 a disk that came back can't be told from one that never left.
	if seq, err := d.readSeq(); err != nil || seq != d.seq {
		if one.Gone = true; d.seq == 0 {
			atomic.StoreUint64(&s.notes().Gone, 1)
		}
	}
	st.Disks = append(st.Disks, one)
}

// judge notes for good if it is certain that changes of a disk were missed: the kernel
// counted much more than the programs saw. A disk that has grown or is another one
// is not judged by its counters: its tail is not watched, and whoever opens it anew knows.
func (s *source) judge(d *device, one capture.DiskStats) {
	// On a device without requests what began before the capture is not known.
	gone := d.mq && one.KernelBytes > one.SeenBytes+slack
	if sectors, err := readNumber(d.sysfs + "/size"); err == nil && int64(sectors) != d.disk.Size/dr.SectorSize {
		gone = false
	}
	if seq, err := d.readSeq(); err != nil || seq != d.seq {
		gone = false // see addCounters
	}
	if gone {
		atomic.StoreUint64(&s.notes().Gone, 1)
	}
}
