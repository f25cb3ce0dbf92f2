package spool

import (
	"farside/internal/dr"
	"farside/internal/frame"
)

// Status is how a spool stands.
type Status struct {
	Bytes       int64        // of all segments
	Limit       int64        // of Bytes; 0 means none
	Synced      frame.Cursor // the end of what is durable here
	Durable     dr.Seq       // the far side is known to have all up to here
	DurableTime int64        // UTC ns, of the frame that holds Durable; 0 if not known
	Backlog     int64        // bytes of the frames behind Durable
	Oldest      int64        // UTC ns, of the first of them; 0 if there is none
	Full        Bound        // what an Append waits for; NoBound if none waits
	Ahead       int64        // bytes that a reader has to come through before it is at what could be folded
	Foldable    int64        // bytes that no reader was shown anything of, in segments of their own
}

// Status returns how the spool stands. It costs one search however much the
// spool holds.
func (s *Spool) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{
		Bytes: s.bytesLocked(), Limit: s.opts.Limit, Synced: s.mu.synced, Full: s.mu.waiting,
		Durable: s.mu.durable, DurableTime: s.mu.durableTime,
	}
	for _, p := range s.mu.parts {
		entries := p.reader.Entries()
		n := len(entries)
		if n == 0 || entries[n-1].Last <= s.mu.durable {
			continue
		}
		first := entries[0]
		if e, ok := p.reader.Find(s.mu.durable + 1); ok {
			first = e
		}
		if st.Backlog == 0 {
			st.Oldest = first.FirstTime
		}
		st.Backlog += entries[n-1].Off + entries[n-1].Len - first.Off
	}
	st.Ahead, st.Foldable = s.unshownBytesLocked()
	return st
}

func (s *Spool) unshownBytesLocked() (ahead, foldable int64) {
	if !s.mu.met {
		return 0, 0
	}
	for _, p := range s.mu.parts {
		entries := p.reader.Entries()
		n := len(entries)
		if n == 0 || entries[n-1].Last <= s.mu.shown {
			continue
		}
		end := entries[n-1].Off + entries[n-1].Len
		if first, ok := p.reader.Find(s.mu.shown + 1); ok && entries[0].First <= s.mu.shown {
			ahead += end - first.Off
			continue
		}
		foldable += end
	}
	return ahead, foldable
}

// timeLocked returns the time of the frame that holds seq, or 0.
func (s *Spool) timeLocked(seq dr.Seq) int64 {
	for _, p := range s.mu.parts {
		if start := p.reader.Start(); start.Position.Seq == seq {
			return start.Time
		}
		if e, ok := p.reader.Find(seq); ok {
			return e.LastTime
		}
	}
	return 0
}
