package procserver

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/link"
)

// bareStream is a stream that only has progress.
func bareStream(durable dr.Seq) *stream {
	s := &stream{}
	s.mu.progress = link.NewProgress(link.Ack{Stored: durable, Durable: durable})
	return s
}

func TestAwaitDurable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := dr.MachineID{1}
		s := bareStream(5)
		streams := map[dr.MachineID]progressOf{id: {s, s.progress()}}
		at := map[dr.MachineID]dr.Position{id: {Timeline: 1, Seq: 7}}
		go func() {
			time.Sleep(time.Minute)
			s.progress().Raise(7, 6)
			time.Sleep(time.Minute)
			s.progress().Raise(7, 7)
		}()
		began := time.Now()
		if err := awaitDurable(t.Context(), streams, at); err != nil || time.Since(began) != 2*time.Minute {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		// Another stream reaches the position: that is not the tag.
		at[id] = dr.Position{Timeline: 1, Seq: 9}
		go func() {
			time.Sleep(time.Second / 2)
			s.mu.Lock()
			s.mu.progress = link.NewProgress(link.Ack{Stored: 20, Durable: 20})
			s.mu.Unlock()
		}()
		if err := awaitDurable(t.Context(), streams, at); !errors.Is(err, dr.ErrUnavailable) || !strings.Contains(err.Error(), "anew") {
			t.Errorf("a stream that began anew: %v", err)
		}
		streams[id] = progressOf{s, s.progress()}
		at[id] = dr.Position{Timeline: 1, Seq: 99}
		short, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := awaitDurable(short, streams, at); !errors.Is(err, dr.ErrUnavailable) || !strings.Contains(err.Error(), "in time") {
			t.Errorf("never durable: %v", err)
		}
	})
}

// A group is tagged when asked and on its schedule; failures are results, and three
// in a row an alert.
func TestGroupsAreLed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var alerts []string
		g := &groups{
			stream: func(dr.MachineID) *stream { return nil },
			notice: func(code string, _ pb.Severity, _ string) { alerts = append(alerts, code) },
			log:    slog.New(slog.DiscardHandler),
		}
		deadline := time.Now().Add(24 * time.Hour).UnixNano()
		want := &pb.GroupAssignment{
			GroupId: "g", Name: "shop", MachineIds: []string{dr.MachineID{1}.String()}, HoldLimitMs: 300, TagEverySeconds: 60,
			Tags: []*pb.GroupTagRequest{{Id: "1", Name: "a", DeadlineNs: deadline}, {Id: "2", Name: "b", DeadlineNs: deadline}},
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		g.assign(ctx, []*pb.GroupAssignment{want})
		time.Sleep(time.Second)
		g.assign(ctx, []*pb.GroupAssignment{want}) // nothing is done twice
		time.Sleep(time.Second)
		got := g.report()
		if len(got) != 2 || got[0].GetId() != "1" || got[1].GetId() != "2" {
			t.Fatalf("results %v", got)
		}
		for _, r := range got {
			if r.GetState() != pb.GroupTagState_GROUP_TAG_STATE_FAILED || !strings.Contains(r.GetError(), "no stream here") || r.GetGroupId() != "g" {
				t.Errorf("result %v", r)
			}
		}
		time.Sleep(time.Minute)
		if got = g.report(); len(got) != 3 || got[2].GetId() != "" || !strings.HasPrefix(got[2].GetName(), "shop ") {
			t.Fatalf("after a minute: %v", got)
		}
		if len(alerts) != 1 || alerts[0] != "group-points-failing" {
			t.Errorf("alerts %v", alerts)
		}
		g.assign(ctx, nil)
		time.Sleep(time.Hour)
		if len(g.report()) != 3 {
			t.Error("a group that is no longer assigned was tagged")
		}
		g.assign(ctx, []*pb.GroupAssignment{{GroupId: "h", MachineIds: []string{"nonsense"}, TagEverySeconds: 1}})
		time.Sleep(100 * time.Second)
		g.close()
		if got = g.report(); len(got) != maxGroupResults {
			t.Errorf("%d results are kept", len(got))
		}
	})
}
