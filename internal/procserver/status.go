package procserver

import (
	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"time"
)

// status describes the stream at a moment.
func (s *stream) status(now time.Time, agentConnected bool) *pb.StreamStatus {
	synced := s.spool.Synced()
	s.mu.Lock()
	defer s.mu.Unlock()
	st := &pb.StreamStatus{
		MachineId: s.machine.String(), Stored: position(synced.Position), StoredTimeNs: synced.Time,
		Durable: position(s.mu.durable.Position), DurableTimeNs: s.mu.durable.Time,
		AgentConnected: agentConnected, TargetConnected: s.mu.connected,
		FramesReceived: s.mu.received, BytesReceived: s.mu.bytesIn, BytesSent: s.mu.bytesOut,
	}
	for _, p := range s.mu.pending {
		st.BacklogBytes += p.size
	}
	if len(s.mu.pending) > 0 {
		st.BacklogAgeMs = max(0, now.UnixNano()-s.mu.pending[0].time) / int64(time.Millisecond)
	}
	switch {
	case s.mu.err != nil:
		st.Error = s.mu.err.Error()
	case !s.mu.ready:
		st.Error = "waiting for the master target to say where the stream stands"
	}
	return st
}

func position(p dr.Position) *pb.Position {
	return &pb.Position{Timeline: uint32(p.Timeline), Seq: uint64(p.Seq)}
}
