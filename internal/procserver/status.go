package procserver

import (
	"fmt"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/spool"
)

// status describes the stream at a moment.
func (s *stream) status(sp spool.Status, now time.Time, agentConnected bool) *pb.StreamStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := &pb.StreamStatus{
		MachineId: s.machine.String(), Stored: position(sp.Synced.Position), StoredTimeNs: sp.Synced.Time,
		Durable:       position(dr.Position{Timeline: sp.Synced.Position.Timeline, Seq: sp.Durable}),
		DurableTimeNs: sp.DurableTime, BacklogBytes: sp.Backlog,
		AgentConnected: agentConnected, TargetConnected: s.mu.connected,
		FramesReceived: s.mu.received, BytesReceived: s.mu.bytesIn, BytesSent: s.mu.bytesOut,
		Error: s.faultLocked(sp),
	}
	s.mu.pace.describe(st)
	if sp.Backlog > 0 {
		st.BacklogAgeMs = max(0, now.UnixNano()-sp.Oldest) / int64(time.Millisecond)
	}
	return st
}

// describe adds what the controller does.
func (p *pace) describe(st *pb.StreamStatus) {
	st.Behind, st.Compression, st.LinkBytesPerSecond = p.behind, p.level.String(), int64(p.linkRate)
	st.Folds, st.FoldedFrames = int64(p.folds), int64(p.folded.Frames)
	st.FoldBytesBefore, st.FoldBytesAfter = p.folded.Before, p.folded.After
}

// faultLocked says what is wrong, or nothing.
func (s *stream) faultLocked(sp spool.Status) (text string) {
	switch {
	case s.mu.err != nil:
		text = s.mu.err.Error()
	case !s.mu.ready:
		text = "waiting for the master target to say where the stream stands"
	}
	if sp.Full != spool.NoBound {
		full := map[spool.Bound]string{
			spool.OwnLimit:   fmt.Sprintf("the spool is full with %v", dr.Size(sp.Bytes)),
			spool.TotalLimit: "all spools together are full",
			spool.DiskFloor:  "the disk of the spool is full but for its reserve",
		}[sp.Full] + ": the agent is held back"
		if text == "" {
			return full
		}
		return full + "; " + text
	}
	return text
}

func position(p dr.Position) *pb.Position {
	return &pb.Position{Timeline: uint32(p.Timeline), Seq: uint64(p.Seq)}
}
