package confserver

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/dr"
)

// eventually calls fn until it is true.
func eventually(t *testing.T, what string, fn func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !fn(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen", what)
		}
	}
}

type tagged struct {
	*farsidev1.TagPointResponse
	err error
}

// tag asks for a tag and returns when the agent is asked for it.
func (s *site) tag(f fleet, req *farsidev1.TagPointRequest) (*farsidev1.TagRequest, chan tagged) {
	s.t.Helper()
	done := make(chan tagged, 1)
	go func() {
		r, err := s.TagPoint(s.t.Context(), req)
		done <- tagged{r, err}
	}()
	var wanted *farsidev1.TagRequest
	eventually(s.t, "asking the agent", func() bool {
		all := f.agent.assignment().GetAgent().GetTags()
		if len(all) > 0 {
			wanted = all[0]
		}
		return wanted != nil
	})
	return wanted, done
}

func TestTagPoint(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f := s.protected()
	wanted, done := s.tag(f, &farsidev1.TagPointRequest{Machine: "web", Name: "vor dem Würfel", Consistency: farsidev1.Consistency_CONSISTENCY_APPLICATION})
	if wanted.GetName() != "vor dem Würfel" || wanted.GetConsistency() != farsidev1.Consistency_CONSISTENCY_APPLICATION || wanted.GetDeadlineNs() == 0 {
		t.Errorf("agent is asked for %v", wanted)
	}
	// What the agent says does not count, nor what a master target says of another machine.
	point := &farsidev1.TagPoint{Id: wanted.GetId(), Name: wanted.GetName(), Position: &farsidev1.Position{Timeline: 1, Seq: 42}, TimeNs: 7, Consistency: farsidev1.Consistency_CONSISTENCY_CRASH}
	f.agent.report(agentWork(&farsidev1.AgentReport{Tags: []*farsidev1.TagResult{{Id: wanted.GetId(), Position: point.GetPosition()}}}))
	f.target.report(targetWork(&farsidev1.MasterTargetReport{Machines: []*farsidev1.TargetStatus{{MachineId: newUUIDs(1)[0], Tags: []*farsidev1.TagPoint{point}}}}))
	select {
	case r := <-done:
		t.Fatalf("done too early: %v", r)
	case <-time.After(50 * time.Millisecond):
	}
	f.target.report(targetWork(&farsidev1.MasterTargetReport{Machines: []*farsidev1.TargetStatus{{MachineId: f.agent.machine(), Tags: []*farsidev1.TagPoint{point}}}}))
	r := <-done
	if r.err != nil || r.GetTag().GetPosition().GetSeq() != 42 || r.GetTag().GetConsistency() != farsidev1.Consistency_CONSISTENCY_CRASH {
		t.Fatalf("%v, %v", r.TagPointResponse, r.err)
	}
	if tags := f.agent.assignment().GetAgent().GetTags(); len(tags) != 0 {
		t.Errorf("agent is still asked for %v", tags)
	}
	points, err := s.ListPoints(t.Context(), &farsidev1.ListPointsRequest{Machine: "web"})
	if err != nil || len(points.GetTags()) != 1 {
		t.Errorf("points %v, %v", points, err)
	}
	// The same request again has the answer at once; another with its id is refused.
	again, err := s.TagPoint(t.Context(), &farsidev1.TagPointRequest{Machine: "web", Name: wanted.GetName(), RequestId: wanted.GetId()})
	if err != nil || again.GetTag().GetPosition().GetSeq() != 42 {
		t.Errorf("again: %v, %v", again, err)
	}
	_, err = s.TagPoint(t.Context(), &farsidev1.TagPointRequest{Machine: "web", Name: "other", RequestId: wanted.GetId()})
	wantKind(t, "id of another", err, api.KindExists)
}

// TestTagPointSaysWhy: a point that is less than was asked comes with the agent's
// reason, whichever report is first, and without one after a while.
func TestTagPointSaysWhy(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f := s.protected()
	for _, tc := range []struct {
		name        string
		agent       []int // when the agent says why: 0 before, 1 after the master target
		detail      string
		consistency farsidev1.Consistency
	}{
		{"early", []int{0}, "hook pg failed", farsidev1.Consistency_CONSISTENCY_CRASH},
		{"late", []int{1}, "hook pg failed", farsidev1.Consistency_CONSISTENCY_CRASH},
		{"twice", []int{0, 1}, "hook pg failed", farsidev1.Consistency_CONSISTENCY_FILESYSTEM},
		{"never", nil, "", farsidev1.Consistency_CONSISTENCY_CRASH},
		{"as asked", nil, "", farsidev1.Consistency_CONSISTENCY_APPLICATION},
	} {
		wanted, done := s.tag(f, &farsidev1.TagPointRequest{Machine: "web", Name: tc.name, Consistency: farsidev1.Consistency_CONSISTENCY_APPLICATION})
		say := func(when int) {
			if slices.Contains(tc.agent, when) {
				f.agent.report(agentWork(&farsidev1.AgentReport{Discovered: disks(), Tags: []*farsidev1.TagResult{{Id: wanted.GetId(), Detail: tc.detail}}}))
			}
		}
		say(0)
		point := &farsidev1.TagPoint{Id: wanted.GetId(), Name: tc.name, Position: &farsidev1.Position{Timeline: 1, Seq: 42}, TimeNs: 7, Consistency: tc.consistency}
		f.target.report(targetWork(&farsidev1.MasterTargetReport{Machines: []*farsidev1.TargetStatus{{MachineId: f.agent.machine(), Tags: []*farsidev1.TagPoint{point}}}}))
		say(1)
		r := <-done
		if r.err != nil || r.GetTag().GetDetail() != tc.detail || r.GetTag().GetConsistency() != tc.consistency {
			t.Errorf("%s: %v, %v", tc.name, r.TagPointResponse, r.err)
		}
	}
}

func TestTagPointFails(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f := s.protected()
	wanted, done := s.tag(f, &farsidev1.TagPointRequest{Machine: "web", Name: "x"})
	f.agent.report(agentWork(&farsidev1.AgentReport{Discovered: disks(), Tags: []*farsidev1.TagResult{{Id: wanted.GetId(), Error: "hook pg failed"}}}))
	r := <-done
	wantKind(t, "agent can't", r.err, api.KindUnavailable)
	if !strings.Contains(r.err.Error(), "hook pg failed") {
		t.Errorf("the reason is lost: %v", r.err)
	}
	_, err := s.TagPoint(t.Context(), &farsidev1.TagPointRequest{Machine: "web", Name: "x", TimeoutMs: 30})
	wantKind(t, "time is over", err, api.KindTimeout)
	eventually(t, "giving up", func() bool { return len(f.agent.assignment().GetAgent().GetTags()) == 0 })

	_, done = s.tag(f, &farsidev1.TagPointRequest{Machine: "web", Name: "x"})
	if _, err := s.UnprotectMachine(t.Context(), &farsidev1.UnprotectMachineRequest{Machine: "web"}); err != nil {
		t.Fatal(err)
	}
	wantKind(t, "unprotected meanwhile", (<-done).err, api.KindUnavailable)
	for name, req := range map[string]*farsidev1.TagPointRequest{
		"not protected":  {Machine: "web", Name: "x"},
		"no name":        {Machine: "web"},
		"300 characters": {Machine: "web", Name: strings.Repeat("x", 300)},
		"consistency":    {Machine: "web", Name: "x", Consistency: 9},
		"request id":     {Machine: "web", Name: "x", RequestId: "1"},
		"time-out":       {Machine: "web", Name: "x", TimeoutMs: 1 << 60},
	} {
		_, err := s.TagPoint(t.Context(), req)
		wantKind(t, name, err, api.KindInvalid)
	}
	_, err = s.TagPoint(t.Context(), &farsidev1.TagPointRequest{Machine: "nix", Name: "x"})
	wantKind(t, "unknown machine", err, api.KindNotFound)
	_, err = s.ListPoints(t.Context(), &farsidev1.ListPointsRequest{Machine: "nix"})
	wantKind(t, "points of nobody", err, api.KindNotFound)
	_, err = s.ListPoints(t.Context(), &farsidev1.ListPointsRequest{Machine: "web", Limit: -1})
	wantKind(t, "negative limit", err, api.KindInvalid)
}

// serveViews does what a master target does with views until the test ends: it
// opens what is wanted, with the state that fn gives it.
func (f fleet) serveViews(fn func(*farsidev1.ViewAssignment, *farsidev1.ViewStatus)) {
	stop, done := make(chan struct{}), make(chan struct{})
	f.target.t.Cleanup(func() {
		close(stop)
		<-done
	})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
			}
			r, err := f.target.Watch(f.target.t.Context(), &farsidev1.WatchRequest{})
			if err != nil {
				continue
			}
			work := &farsidev1.MasterTargetReport{}
			for _, v := range r.GetAssignment().GetMasterTarget().GetViews() {
				st := &farsidev1.ViewStatus{ViewId: v.GetViewId(), MachineId: v.GetMachineId(), State: farsidev1.ViewState_VIEW_STATE_OPEN}
				fn(v, st)
				work.Views = append(work.Views, st)
			}
			report := targetWork(work)
			report.AssignmentRevision, report.ClockNs = r.GetAssignment().GetRevision(), time.Now().UnixNano()
			if _, err := f.target.Report(f.target.t.Context(), &farsidev1.ReportRequest{Report: report}); err != nil {
				continue
			}
		}
	}()
}

func TestViews(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f := s.protected()
	f.serveViews(func(v *farsidev1.ViewAssignment, st *farsidev1.ViewStatus) {
		if v.GetName() == "bad" {
			st.State, st.Error, st.ErrorKind = farsidev1.ViewState_VIEW_STATE_FAILED, "no such moment", api.KindNoPoint
			return
		}
		st.Position, st.OpenMs = &farsidev1.Position{Timeline: 1, Seq: 5}, 1.5
		st.Exports = []*farsidev1.Export{{DiskId: 1, Uris: []string{"nbd://10.0.0.3:10809/" + v.GetViewId()}}}
	})
	r, err := s.OpenView(t.Context(), &farsidev1.OpenViewRequest{Machine: "web", Writable: true, Wait: true, Name: "drill", DiskIds: []uint32{1}})
	if err != nil {
		t.Fatal(err)
	}
	v := r.GetView()
	if v.GetStatus().GetState() != farsidev1.ViewState_VIEW_STATE_OPEN || len(v.GetStatus().GetExports()) != 1 || v.GetMachineName() != "web" {
		t.Errorf("view %v", v)
	}
	// "Latest" stays where it was, and the branch has a timeline of its own.
	eventually(t, "fixing the position", func() bool {
		w := f.target.assignment().GetMasterTarget().GetViews()
		return len(w) == 1 && w[0].GetResolved().GetSeq() == 5 && w[0].GetBranchTimeline() == 2
	})
	again, err := s.OpenView(t.Context(), &farsidev1.OpenViewRequest{Machine: "web", Writable: true, Wait: true, RequestId: v.GetId()})
	if err != nil || again.GetView().GetId() != v.GetId() {
		t.Errorf("the same request again: %v, %v", again, err)
	}
	_, err = s.OpenView(t.Context(), &farsidev1.OpenViewRequest{Machine: "web", RequestId: v.GetId()})
	wantKind(t, "id of another", err, api.KindExists)

	_, err = s.OpenView(t.Context(), &farsidev1.OpenViewRequest{Machine: "web", Name: "bad", Wait: true})
	wantKind(t, "can't be opened", err, api.KindNoPoint)
	if !strings.Contains(err.Error(), "no such moment") {
		t.Errorf("the reason is lost: %v", err)
	}
	eventually(t, "forgetting the failed view", func() bool { return len(s.views("")) == 1 })

	closed, err := s.CloseView(t.Context(), &farsidev1.CloseViewRequest{View: "drill", Wait: true})
	if err != nil || closed.GetView().GetStatus().GetState() != farsidev1.ViewState_VIEW_STATE_CLOSED {
		t.Errorf("closed %v, %v", closed, err)
	}
	if left := s.views("web"); len(left) != 0 {
		t.Errorf("views %v", left)
	}
	_, err = s.CloseView(t.Context(), &farsidev1.CloseViewRequest{View: v.GetId()})
	wantKind(t, "closed already", err, api.KindNotFound)
}

func (s *site) views(machine string) []*farsidev1.View {
	s.t.Helper()
	r, err := s.ListViews(s.t.Context(), &farsidev1.ListViewsRequest{Machine: machine})
	if err != nil {
		s.t.Fatal(err)
	}
	return r.GetViews()
}

func TestViewsRefuse(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f := s.fleet()
	_, err := s.OpenView(t.Context(), &farsidev1.OpenViewRequest{Machine: "web"})
	wantKind(t, "never protected", err, api.KindNoPoint)
	if _, err := s.ProtectMachine(t.Context(), &farsidev1.ProtectMachineRequest{Machine: "web", DiskPaths: []string{"/dev/sda"}}); err != nil {
		t.Fatal(err)
	}
	for name, req := range map[string]*farsidev1.OpenViewRequest{
		"selector":   {Machine: "web", Selector: &farsidev1.Selector{Point: &farsidev1.Selector_Tag{}}},
		"request id": {Machine: "web", RequestId: "x"},
		"disk 0":     {Machine: "web", DiskIds: []uint32{0}},
		"time-out":   {Machine: "web", TimeoutMs: -1},
		"name":       {Machine: "web", Name: "a\tb"},
	} {
		_, err := s.OpenView(t.Context(), req)
		wantKind(t, name, err, api.KindInvalid)
	}
	_, err = s.OpenView(t.Context(), &farsidev1.OpenViewRequest{Machine: "web", Wait: true, TimeoutMs: 20})
	wantKind(t, "nobody opens it", err, api.KindTimeout)
	r, err := s.OpenView(t.Context(), &farsidev1.OpenViewRequest{Machine: "web", Name: "v"})
	if err != nil || r.GetView().GetStatus().GetState() != farsidev1.ViewState_VIEW_STATE_OPENING {
		t.Fatalf("without waiting: %v, %v", r, err)
	}
	// A report from before the closing does not count as proof of it.
	old := f.target.assignment().GetRevision()
	if _, err := s.CloseView(t.Context(), &farsidev1.CloseViewRequest{View: "v"}); err != nil {
		t.Fatal(err)
	}
	late := targetWork(&farsidev1.MasterTargetReport{})
	late.AssignmentRevision = old
	f.target.report(late)
	_, err = s.CloseView(t.Context(), &farsidev1.CloseViewRequest{View: "v", Wait: true, TimeoutMs: 20})
	wantKind(t, "not closed yet", err, api.KindTimeout)
	f.target.report(targetWork(&farsidev1.MasterTargetReport{}))
	if left := s.views(""); slices.ContainsFunc(left, func(v *farsidev1.View) bool { return v.GetName() == "v" }) {
		t.Errorf("views %v", left)
	}
	for _, key := range []string{"", "nix", newUUIDs(1)[0]} {
		if _, err := s.CloseView(t.Context(), &farsidev1.CloseViewRequest{View: key}); err == nil {
			t.Errorf("closed %q", key)
		}
	}
	_, err = s.ListViews(t.Context(), &farsidev1.ListViewsRequest{Machine: "nix"})
	wantKind(t, "views of nobody", err, api.KindNotFound)
}

func TestReportRefuses(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f := s.fleet()
	for name, tc := range map[string]struct {
		node   *testNode
		report *farsidev1.Report
		kind   string
	}{
		"agent as target":    {f.agent, targetWork(&farsidev1.MasterTargetReport{}), api.KindDenied},
		"target as agent":    {f.target, agentWork(&farsidev1.AgentReport{}), api.KindDenied},
		"another's machine":  {f.agent, agentWork(&farsidev1.AgentReport{MachineId: newUUIDs(1)[0]}), api.KindDenied},
		"address":            {f.process, &farsidev1.Report{Addresses: []string{"x"}}, api.KindInvalid},
		"too many addresses": {f.process, &farsidev1.Report{Addresses: make([]string, 17)}, api.KindInvalid},
		"nothing":            {f.process, nil, api.KindInvalid},
	} {
		_, err := tc.node.Report(t.Context(), &farsidev1.ReportRequest{Report: tc.report})
		wantKind(t, name, err, tc.kind)
	}
}

// TestLateReport: a report that was overtaken by a newer one changes nothing.
func TestLateReport(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f := s.fleet()
	send := func(clock int64, phase farsidev1.Phase) {
		r := agentWork(&farsidev1.AgentReport{Discovered: disks(), Error: phase.String()})
		r.ClockNs = clock
		f.agent.report(r)
	}
	now := time.Now().UnixNano()
	send(now+2, farsidev1.Phase_PHASE_EXACT)
	send(now+1, farsidev1.Phase_PHASE_FAILED)
	if _, err := s.ProtectMachine(t.Context(), &farsidev1.ProtectMachineRequest{Machine: "web", DiskPaths: []string{"/dev/sda"}}); err != nil {
		t.Fatal(err)
	}
	m, err := s.GetMachine(t.Context(), &farsidev1.GetMachineRequest{Machine: "web"})
	if err != nil || m.GetMachine().GetReason() != "PHASE_EXACT" {
		t.Errorf("%v, %v", m, err)
	}
	// After a restart of the node, its clock may say what it likes.
	f.agent.started++
	send(5, farsidev1.Phase_PHASE_WAITING)
	if m, err = s.GetMachine(t.Context(), &farsidev1.GetMachineRequest{Machine: "web"}); err != nil || m.GetMachine().GetReason() != "PHASE_WAITING" {
		t.Errorf("%v, %v", m, err)
	}
}

func TestWireErrors(t *testing.T) {
	for _, k := range wireKinds() {
		e := wireError(errors.Join(errors.New("x"), k.is))
		if e.Code() != k.code || api.ErrorKind(e) != k.kind {
			t.Errorf("%v: code %v, kind %q", k.is, e.Code(), api.ErrorKind(e))
		}
	}
	if e := wireError(errors.New("x")); api.ErrorKind(e) != api.KindInternal {
		t.Errorf("any: %v", e)
	}
	if !errors.Is(viewError(&farsidev1.ViewStatus{ErrorKind: api.KindNotFound}), dr.ErrNotFound) ||
		!errors.Is(viewError(&farsidev1.ViewStatus{ErrorKind: "new"}), dr.ErrUnavailable) {
		t.Error("kinds of view errors are lost")
	}
}
