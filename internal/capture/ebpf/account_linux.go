//go:build linux && amd64

package ebpf

import (
	"sync/atomic"

	"farside/internal/capture"
)

// addCounters adds what was counted of disk number i.
func (s *source) addCounters(st *capture.Stats, i int) {
	d, base := s.devs[i], &s.notes().Base[i]
	one := capture.DiskStats{ID: d.disk.ID}
	bytes, writes, err := d.written() // first: it counts at completion
	if err == nil {
		one.KernelBytes, one.KernelWrites = bytes-base.Bytes, writes-base.Writes
	}
	var perCPU []counters
	if err := s.prog.objs.Counts.Lookup(uint32(i), &perCPU); err == nil {
		for _, c := range perCPU {
			st.Writes += c.Writes
			st.Bytes += c.Bytes
			st.Flushes += c.Flushes
			st.Marked += c.Marked
			one.SeenWrites += c.Seen
			one.SeenBytes += c.SeenBytes
		}
	}
	st.Disks = append(st.Disks, one)
	s.judge(d)
}

// judge notes for good if it is certain that changes of a disk were missed: it is
// another one.
func (s *source) judge(d *device) {
	if seq, err := d.readSeq(); err != nil || seq != d.seq {
		atomic.StoreUint64(&s.notes().Gone, 1)
	}
}
