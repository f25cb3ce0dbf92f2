package ebpf

import "farside/internal/dr"

// A softWrite is a captured write that failed in a way that its submitter is expected to
// answer by another write of the same range: by another operation, or with more
// patience. If that doesn't come, the stream has data that the disk hasn't.
type softWrite struct {
	extent dr.Extent
	until  uint64 // when to give up waiting, ns of the monotonic clock
	pos    uint64 // of the record of the failure
}

// softWrites is what is waited for, oldest first.
type softWrites struct{ list []softWrite }

// maxSoft is how many are waited for at most.
const maxSoft = 4096

func (s *softWrites) add(w softWrite) { s.list = append(s.list, w) }

// cover takes x away: it was captured again.
func (s *softWrites) cover(x dr.Extent) {
	for i := 0; i < len(s.list); i++ {
		w := &s.list[i]
		from, to := max(w.extent.Offset, x.Offset), min(w.extent.End(), x.End())
		if w.extent.Disk != x.Disk || from >= to {
			continue
		}
		behind := *w
		behind.extent.Offset, behind.extent.Length = to, w.extent.End()-to
		w.extent.Length = from - w.extent.Offset
		switch {
		case w.extent.Length == 0 && behind.extent.Length == 0:
			s.list = append(s.list[:i], s.list[i+1:]...)
			i--
		case w.extent.Length == 0:
			*w = behind
		case behind.extent.Length > 0:
			s.list = append(s.list, softWrite{})
			copy(s.list[i+2:], s.list[i+1:])
			s.list[i+1] = behind
			i++
		}
	}
}

// due reports whether it is time to give up.
func (s *softWrites) due(now uint64) bool {
	return len(s.list) > maxSoft || len(s.list) > 0 && s.list[0].until <= now
}

// hold returns pos, or the place of the oldest failure if that is before: a process that
// adopts must see it again.
func (s *softWrites) hold(pos uint64) uint64 {
	if len(s.list) == 0 {
		return pos
	}
	return min(pos, s.list[0].pos)
}
