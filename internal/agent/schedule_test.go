package agent

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
)

// TestScheduledPoints: points come by themselves; three failures in a row are an alert
// until one succeeds.
func TestScheduledPoints(t *testing.T) {
	onIce(t, 100*time.Millisecond, func(l *lab, b *iceBox) {
		l.assign(l.assignment(func(p *pb.AgentAssignment) {
			p.Settings = &pb.AgentSettings{Points: &pb.PointSchedule{FilesystemEveryMs: new(int64(60_000)), FreezeLimitMs: new(int64(2000))}}
		}))
		time.Sleep(5*time.Minute + 30*time.Second)
		got := l.server.tagged()
		if len(got) != 5 || got[0].Consistency != dr.FileSystem || !strings.HasPrefix(got[0].Name, "filesystem 2") {
			t.Fatalf("%d points in five minutes: %v", len(got), got)
		}
		b.mu.Lock()
		b.fail = errors.New("a disk on fire")
		b.mu.Unlock()
		time.Sleep(2 * time.Minute)
		if a := l.points.alerts(time.Now()); len(a) != 0 {
			t.Errorf("alert after two failures: %v", a)
		}
		time.Sleep(time.Minute)
		if a := l.points.alerts(time.Now()); len(a) != 1 || !strings.Contains(a[0].text, "a disk on fire") {
			t.Errorf("alerts after three failures: %v", a)
		}
		b.mu.Lock()
		b.fail = nil
		b.mu.Unlock()
		time.Sleep(time.Minute)
		if a := l.points.alerts(time.Now()); len(a) != 0 {
			t.Errorf("alert after a success: %v", a)
		}
		var codes []string
		for _, n := range l.report(time.Now()).GetEvents() {
			if strings.HasPrefix(n.GetCode(), "point") {
				codes = append(codes, n.GetCode())
			}
		}
		if !slices.Equal(codes, []string{"point-fallback", "point-fallback", "point-fallback", "points-failing", "points-recovered"}) {
			t.Errorf("events %v", codes)
		}
		var kinds []dr.Consistency
		for _, tag := range l.server.tagged()[5:] {
			kinds = append(kinds, tag.Consistency)
		}
		if !slices.Equal(kinds, []dr.Consistency{dr.Crash, dr.Crash, dr.Crash, dr.FileSystem}) {
			t.Errorf("kinds %v", kinds)
		}
	})
}

func TestSchedule(t *testing.T) {
	t.Parallel()
	t0 := time.Unix(1_000_000, 0)
	var s schedule
	if _, ok := s.next(t0); ok || s.wait(t0) != time.Hour || s.freezeLimit() != defaultFreezeLimit {
		t.Error("something is due by an empty schedule")
	}
	p := &pb.PointSchedule{FilesystemEveryMs: new(int64(60_000)), ApplicationEveryMs: new(int64(600_000)), FreezeLimitMs: new(int64(500))}
	s.set(p, t0)
	if s.wait(t0) != time.Minute || s.freezeLimit() != 500*time.Millisecond {
		t.Errorf("due in %s, limit %s", s.wait(t0), s.freezeLimit())
	}
	at := t0.Add(70 * time.Second)
	s.set(p, at) // the same again changes nothing
	tag, ok := s.next(at)
	if !ok || tag.Consistency != dr.FileSystem || tag.Name != "filesystem 1970-01-12T13:47:50Z" {
		t.Errorf("due: %v, %+v", ok, tag)
	}
	s.made(dr.FileSystem, nil, at, at.Add(time.Second))
	if got := s.wait(at); got != 50*time.Second {
		t.Errorf("the next is due in %s", got)
	}
	// Behind a long pause one is made, not many, and the stronger one serves for both.
	at = t0.Add(time.Hour)
	if tag, ok = s.next(at); !ok || tag.Consistency != dr.Application {
		t.Errorf("due: %v, %+v", ok, tag)
	}
	s.made(dr.Application, nil, at, at)
	if _, ok = s.next(at); ok || s.wait(at) != time.Minute {
		t.Errorf("due again: %v, in %s", ok, s.wait(at))
	}
	// A stronger one that fails does not serve for the weaker one.
	at = t0.Add(2 * time.Hour)
	s.made(dr.Application, errors.New("x"), at, at)
	if tag, ok = s.next(at); !ok || tag.Consistency != dr.FileSystem {
		t.Errorf("due: %v, %+v", ok, tag)
	}
	s.set(nil, at)
	if _, ok = s.next(at.Add(24 * time.Hour)); ok {
		t.Error("due by a schedule that ended")
	}
}
