package confserver

import (
	"errors"
	"testing"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
	"farside/internal/dr"
	"farside/internal/transport"
)

// group is a fleet with a second machine, "db", both protected, and a group of the two.
func (s *site) group() (fleet, *testNode, *farsidev1.Group) {
	s.t.Helper()
	f := s.protected()
	second := s.join(transport.RoleAgent, "db")
	second.report(agentWork(&farsidev1.AgentReport{Discovered: disks()}))
	if _, err := s.ProtectMachine(s.t.Context(), &farsidev1.ProtectMachineRequest{Machine: "db", DiskPaths: []string{"/dev/sda"}}); err != nil {
		s.t.Fatal(err)
	}
	r, err := s.SetGroup(s.t.Context(), &farsidev1.SetGroupRequest{Name: "shop", Machines: []string{"web", "db"}})
	if err != nil {
		s.t.Fatal(err)
	}
	return f, second, r.GetGroup()
}

func TestSetGroup(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f, _, g := s.group()
	if len(g.GetMachineIds()) != 2 || g.GetHoldLimitMs() != 300 || g.GetConsistency() != farsidev1.Consistency_CONSISTENCY_FILESYSTEM || g.GetProcessServerId() != f.process.String() {
		t.Errorf("group %v", g)
	}
	r, err := s.SetGroup(t.Context(), &farsidev1.SetGroupRequest{Name: "shop", TagEverySeconds: 60, HoldLimitMs: 200, Consistency: farsidev1.Consistency_CONSISTENCY_APPLICATION})
	if err != nil || r.GetGroup().GetId() != g.GetId() || r.GetGroup().GetTagEverySeconds() != 60 || len(r.GetGroup().GetMachineIds()) != 2 {
		t.Errorf("changed: %v, %v", r, err)
	}
	led := f.process.assignment().GetProcessServer().GetGroups()
	if len(led) != 1 || led[0].GetHoldLimitMs() != 200 || len(led[0].GetMachineIds()) != 2 || led[0].GetTagEverySeconds() != 60 {
		t.Errorf("process server is assigned %v", led)
	}
	if r, err = s.SetGroup(t.Context(), &farsidev1.SetGroupRequest{Name: "shop", TagEverySeconds: -1}); err != nil || r.GetGroup().GetTagEverySeconds() != 0 {
		t.Errorf("no schedule: %v, %v", r, err)
	}
	list, err := s.ListGroups(t.Context(), &farsidev1.ListGroupsRequest{})
	if err != nil || len(list.GetGroups()) != 1 || list.GetGroups()[0].GetName() != "shop" {
		t.Errorf("list: %v, %v", list, err)
	}
	// A machine that is no longer protected leaves the group without a leader.
	if _, err := s.UnprotectMachine(t.Context(), &farsidev1.UnprotectMachineRequest{Machine: "db"}); err != nil {
		t.Fatal(err)
	}
	if led := f.process.assignment().GetProcessServer().GetGroups(); len(led) != 0 {
		t.Errorf("still leads %v", led)
	}
	_, err = s.TagGroup(t.Context(), &farsidev1.TagGroupRequest{Group: "shop", Name: "n"})
	wantKind(t, "tag of a group with an unprotected machine", err, api.KindInvalid)
	if _, err := s.DeleteGroup(t.Context(), &farsidev1.DeleteGroupRequest{Group: "shop"}); err != nil {
		t.Error(err)
	}
	_, err = s.DeleteGroup(t.Context(), &farsidev1.DeleteGroupRequest{Group: "shop"})
	wantKind(t, "deleting twice", err, api.KindNotFound)
}

func TestSetGroupRefuses(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.group()
	if err := func() error {
		_, err := s.SetGroup(t.Context(), &farsidev1.SetGroupRequest{Name: "other", Machines: []string{"web"}})
		return err
	}(); err == nil {
		t.Error("a machine in two groups")
	}
	for what, c := range map[string]struct {
		req  *farsidev1.SetGroupRequest
		kind string
	}{
		"no name":          {&farsidev1.SetGroupRequest{Machines: []string{"web"}}, api.KindInvalid},
		"no machines":      {&farsidev1.SetGroupRequest{Name: "x"}, api.KindInvalid},
		"unknown machine":  {&farsidev1.SetGroupRequest{Name: "x", Machines: []string{"y"}}, api.KindNotFound},
		"long hold":        {&farsidev1.SetGroupRequest{Name: "shop", HoldLimitMs: 11_000}, api.KindInvalid},
		"negative hold":    {&farsidev1.SetGroupRequest{Name: "shop", HoldLimitMs: -1}, api.KindInvalid},
		"rare tags":        {&farsidev1.SetGroupRequest{Name: "shop", TagEverySeconds: 1 << 40}, api.KindInvalid},
		"crash consistent": {&farsidev1.SetGroupRequest{Name: "shop", Consistency: farsidev1.Consistency_CONSISTENCY_CRASH}, api.KindInvalid},
		"control":          {&farsidev1.SetGroupRequest{Name: "a\x00b", Machines: []string{"web"}}, api.KindInvalid},
		"many machines":    {&farsidev1.SetGroupRequest{Name: "x", Machines: make([]string, maxMembers+1)}, api.KindInvalid},
		"the same twice":   {&farsidev1.SetGroupRequest{Name: "shop", Machines: []string{"web", "web"}}, api.KindExists},
	} {
		_, err := s.SetGroup(t.Context(), c.req)
		wantKind(t, what, err, c.kind)
	}
	list, err := s.ListGroups(t.Context(), &farsidev1.ListGroupsRequest{})
	if err != nil || len(list.GetGroups()) != 1 || len(list.GetGroups()[0].GetMachineIds()) != 2 {
		t.Errorf("a refused request left %v, %v", list, err)
	}
}

func TestTagGroup(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f, _, g := s.group()
	type answer struct {
		*farsidev1.TagGroupResponse
		err error
	}
	tag := func(name string) (*farsidev1.GroupTagRequest, chan answer) {
		done := make(chan answer, 1)
		go func() {
			r, err := s.TagGroup(t.Context(), &farsidev1.TagGroupRequest{Group: "shop", Name: name})
			done <- answer{r, err}
		}()
		var wanted *farsidev1.GroupTagRequest
		eventually(t, "asking the process server", func() bool {
			for _, w := range f.process.assignment().GetProcessServer().GetGroups()[0].GetTags() {
				if w.GetName() == name {
					wanted = w
				}
			}
			return wanted != nil
		})
		return wanted, done
	}
	say := func(n *testNode, r *farsidev1.GroupTagResult) {
		r.GroupId = g.GetId()
		n.report(&farsidev1.Report{Addresses: []string{"10.0.0.2:7441"}, Work: &farsidev1.Report_ProcessServer{
			ProcessServer: &farsidev1.ProcessServerReport{GroupTags: []*farsidev1.GroupTagResult{r}},
		}})
	}
	wanted, done := tag("before")
	if wanted.GetConsistency() != farsidev1.Consistency_CONSISTENCY_FILESYSTEM || wanted.GetDeadlineNs() == 0 {
		t.Errorf("asked for %v", wanted)
	}
	// Another process server's word does not count.
	stranger := s.join(transport.RoleProcessServer, "other")
	say(stranger, &farsidev1.GroupTagResult{Id: wanted.GetId(), State: farsidev1.GroupTagState_GROUP_TAG_STATE_DURABLE})
	say(f.process, &farsidev1.GroupTagResult{Id: wanted.GetId(), State: farsidev1.GroupTagState_GROUP_TAG_STATE_TAGGED})
	select {
	case r := <-done:
		t.Fatalf("done too early: %v", r)
	default:
	}
	say(f.process, &farsidev1.GroupTagResult{
		Id: wanted.GetId(), State: farsidev1.GroupTagState_GROUP_TAG_STATE_DURABLE, TimeNs: 9, HeldMs: 12.5, Consistency: farsidev1.Consistency_CONSISTENCY_FILESYSTEM,
	})
	if r := <-done; r.err != nil || r.GetTag().GetTimeNs() != 9 || r.GetTag().GetHeldMs() != 12.5 {
		t.Errorf("answer %v, %v", r.TagGroupResponse, r.err)
	}
	if tags := f.process.assignment().GetProcessServer().GetGroups()[0].GetTags(); len(tags) != 0 {
		t.Errorf("still asked for %v", tags)
	}
	wanted, done = tag("fails")
	say(f.process, &farsidev1.GroupTagResult{Id: wanted.GetId(), State: farsidev1.GroupTagState_GROUP_TAG_STATE_FAILED, Error: "machine x thawed"})
	r := <-done
	wantKind(t, "a barrier that failed", r.err, api.KindUnavailable)

	_, done = tag("late")
	s.clock.advance(2 * defaultPatience)
	r = <-done
	wantKind(t, "a tag that never came", r.err, api.KindTimeout)
	_, err := s.TagGroup(t.Context(), &farsidev1.TagGroupRequest{Group: "shop", Name: "other", RequestId: wanted.GetId()})
	wantKind(t, "the id of another request", err, api.KindExists)
}

// A point is complete only if each machine of the group bears the same barrier's tag.
func TestGroupPoints(t *testing.T) {
	point := func(group string, seq uint64, ns int64, c farsidev1.Consistency) *farsidev1.TagPoint {
		return &farsidev1.TagPoint{Name: "n" + group, GroupId: group, Position: &farsidev1.Position{Timeline: 1, Seq: seq}, TimeNs: ns, Consistency: c}
	}
	const fs, app = farsidev1.Consistency_CONSISTENCY_FILESYSTEM, farsidev1.Consistency_CONSISTENCY_APPLICATION
	got := groupPoints(map[dr.MachineID]*farsidev1.TargetStatus{
		{1}: {Tags: []*farsidev1.TagPoint{point("", 1, 1, fs), point("a", 2, 10, app), point("b", 3, 20, fs)}},
		{2}: {Tags: []*farsidev1.TagPoint{point("a", 9, 12, fs), point("c", 11, 30, fs)}},
	})
	if len(got) != 3 || got[0].GetId() != "a" || !got[0].GetComplete() || got[0].GetTimeNs() != 12 || got[0].GetConsistency() != fs || len(got[0].GetMembers()) != 2 {
		t.Fatalf("points %v", got)
	}
	if got[1].GetId() != "b" || got[1].GetComplete() || got[2].GetComplete() {
		t.Errorf("incomplete points %v", got[1:])
	}
}

func TestListGroupPoints(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f, second, _ := s.group()
	tag := &farsidev1.TagPoint{Id: newUUIDs(1)[0], GroupId: newUUIDs(1)[0], Position: &farsidev1.Position{Timeline: 1, Seq: 2}, TimeNs: 5}
	f.target.report(targetWork(&farsidev1.MasterTargetReport{Machines: []*farsidev1.TargetStatus{
		{MachineId: f.agent.machine(), Tags: []*farsidev1.TagPoint{tag}}, {MachineId: second.machine(), Tags: []*farsidev1.TagPoint{tag}},
	}}))
	r, err := s.ListGroupPoints(t.Context(), &farsidev1.ListGroupPointsRequest{Group: "shop"})
	if err != nil || len(r.GetPoints()) != 1 || !r.GetPoints()[0].GetComplete() {
		t.Errorf("points %v, %v", r, err)
	}
	_, err = s.ListGroupPoints(t.Context(), &farsidev1.ListGroupPointsRequest{Group: "nobody"})
	wantKind(t, "an unknown group", err, api.KindNotFound)
	_, err = s.ListGroupPoints(t.Context(), &farsidev1.ListGroupPointsRequest{Group: "shop", Limit: -1})
	wantKind(t, "a negative limit", err, api.KindInvalid)
	s.edit(func(tx *catalog.Tx) error {
		if _, err := tx.GroupOf(dr.MachineID{9}); !errors.Is(err, dr.ErrNotFound) {
			t.Errorf("group of a stranger: %v", err)
		}
		return nil
	})
}
