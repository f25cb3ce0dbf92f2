package agent

import (
	"fmt"
	"sync"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
)

// schedule says when points are due that nobody asks for, and how they fared. It
// outlives the streams and is safe for concurrent use.
type schedule struct {
	mu struct {
		sync.Mutex
		limit time.Duration
		kinds [2]kindSchedule // the stronger one first
	}
}

// kindSchedule is the schedule of one kind of point.
type kindSchedule struct {
	kind   dr.Consistency
	every  time.Duration // 0: never
	due    time.Time
	failed int // in a row
	why    error
}

// alertAfter is how many scheduled points of a kind must fail in a row to be worth
// an alert.
const alertAfter = 3

// set takes over what the assignment says. A kind whose interval changes is due one interval from now.
func (s *schedule) set(p *pb.PointSchedule, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.limit = time.Duration(p.GetFreezeLimitMs()) * time.Millisecond
	for i, k := range []struct {
		kind dr.Consistency
		ms   int64
	}{{dr.Application, p.GetApplicationEveryMs()}, {dr.FileSystem, p.GetFilesystemEveryMs()}} {
		every := time.Duration(max(k.ms, 0)) * time.Millisecond
		if have := s.mu.kinds[i]; have.kind != k.kind || have.every != every {
			s.mu.kinds[i] = kindSchedule{kind: k.kind, every: every, due: now.Add(every)}
		}
	}
}

// freezeLimit returns how long a freeze may last.
func (s *schedule) freezeLimit() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.limit > 0 {
		return s.mu.limit
	}
	return defaultFreezeLimit
}

// next returns the tag of the point that is due as of now.
func (s *schedule) next(now time.Time) (dr.Tag, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.mu.kinds {
		if k.every > 0 && !now.Before(k.due) {
			name := fmt.Sprintf("%s %s", k.kind, now.UTC().Format(time.RFC3339))
			return dr.Tag{ID: dr.NewNodeID(), Consistency: k.kind, Name: name}, true
		}
	}
	return dr.Tag{}, false
}

// wait returns how long it is until a point is due; an hour if none is.
func (s *schedule) wait(now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	wait := time.Hour
	for _, k := range s.mu.kinds {
		if k.every > 0 {
			wait = min(wait, max(k.due.Sub(now), 0))
		}
	}
	return wait
}

// made notes that a point that was due at began was made by now, or failed, and returns what is worth a
// notice. What was missed meanwhile is not made up for. A point also serves as one
// of a weaker kind.
func (s *schedule) made(kind dr.Consistency, err error, began, now time.Time) []notice {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []notice
	for i := range s.mu.kinds {
		k := &s.mu.kinds[i]
		if k.every == 0 || k.kind > kind || k.kind < kind && (!isMade(err) || began.Before(k.due)) {
			continue
		}
		for !k.due.After(now) {
			k.due = k.due.Add(k.every * max(1, now.Sub(k.due)/k.every))
		}
		out = append(out, k.count(err, now)...)
	}
	return out
}

// count counts a success or a failure.
func (k *kindSchedule) count(err error, now time.Time) []notice {
	if isMade(err) {
		before := k.failed
		k.failed, k.why = 0, nil
		if before >= alertAfter {
			return []notice{{"points-recovered", false, fmt.Sprintf("scheduled %s points are made again, after %d failures", k.kind, before), now}}
		}
		return nil
	}
	k.failed, k.why = k.failed+1, err
	if k.failed == alertAfter {
		return []notice{{codeFailing, true, k.alert(), now}}
	}
	return nil
}

// codeFailing is the code of the alert.
const codeFailing = "points-failing"

func (k *kindSchedule) alert() string {
	return fmt.Sprintf("%d scheduled %s points in a row failed; the last: %v", k.failed, k.kind, k.why)
}

// alerts returns what holds now and somebody should look at.
func (s *schedule) alerts(now time.Time) []notice {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []notice
	for _, k := range s.mu.kinds {
		if k.failed >= alertAfter {
			out = append(out, notice{codeFailing, true, k.alert(), now})
		}
	}
	return out
}

// isMade reports whether a point came about, be it with a remark.
func isMade(err error) bool {
	_, remark := err.(*partly) //nolint:errorlint // it is never wrapped
	return err == nil || remark
}
