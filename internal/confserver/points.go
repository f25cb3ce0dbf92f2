package confserver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
	"farside/internal/dr"
)

const (
	defaultPoints = 1000
	maxPoints     = 100_000
	tagNotInTime  = "the tag was not durable in time"
	detailWait    = time.Second // for the agent to say why a tag is less than was asked
)

// ListPoints implements the call.
func (s farsideService) ListPoints(ctx context.Context, req *farsidev1.ListPointsRequest) (*farsidev1.ListPointsResponse, error) {
	if req.GetLimit() < 0 || req.GetFromNs() < 0 || req.GetToNs() < 0 {
		return nil, fmt.Errorf("list points: limit or times are negative: %w", dr.ErrInvalid)
	}
	var m catalog.Machine
	err := s.catalog.Read(ctx, func(tx *catalog.Tx) (err error) {
		m, err = findMachine(tx, req.GetMachine())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list points: %w", err)
	}
	return selectPoints(facts{machine: m, target: s.report(m.MasterTarget)}.targetStatus(), req), nil
}

// selectPoints returns what a request asks for of a machine's history.
func selectPoints(t *farsidev1.TargetStatus, req *farsidev1.ListPointsRequest) *farsidev1.ListPointsResponse {
	limit := defaultPoints
	if n := req.GetLimit(); n != 0 {
		limit = min(int(n), maxPoints)
	}
	before := func(ns int64) bool { return req.GetToNs() == 0 || ns < req.GetToNs() }
	res := &farsidev1.ListPointsResponse{
		Horizon: t.GetHorizon(), HorizonTimeNs: t.GetHorizonTimeNs(), Newest: t.GetNewest(), Truncated: t.GetSpansCut(),
	}
	for _, sp := range t.GetSpans() {
		if sp.GetLastTimeNs() >= req.GetFromNs() && before(sp.GetFirstTimeNs()) {
			res.Spans = append(res.Spans, sp)
		}
	}
	for _, g := range t.GetTags() {
		if g.GetTimeNs() >= req.GetFromNs() && before(g.GetTimeNs()) {
			res.Tags = append(res.Tags, g)
		}
	}
	if n := len(res.GetSpans()) - limit; n > 0 {
		res.Spans, res.Truncated = slices.Delete(res.GetSpans(), 0, n), true
	}
	if n := len(res.GetTags()) - limit; n > 0 {
		res.Tags, res.Truncated = slices.Delete(res.GetTags(), 0, n), true
	}
	return res
}

// TagPoint implements the call.
func (s farsideService) TagPoint(ctx context.Context, req *farsidev1.TagPointRequest) (*farsidev1.TagPointResponse, error) {
	row, patience, err := s.newTag(req)
	if err != nil {
		return nil, fmt.Errorf("tag point: %w", err)
	}
	var agent dr.NodeID
	err = s.catalog.Write(ctx, func(tx *catalog.Tx) error {
		m, err := findMachine(tx, req.GetMachine())
		if err != nil {
			return err
		}
		if row.Machine = m.ID; !m.Protected {
			return fmt.Errorf("machine %q is not protected: %w", m.Name, dr.ErrInvalid)
		}
		agent = m.Node
		err = tx.AddTag(row)
		if errors.Is(err, dr.ErrExists) {
			return sameTag(tx, row)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("tag point: %w", err)
	}
	s.hub.wake(agent)
	done, err := s.waitForTag(ctx, row.ID, patience)
	if err == nil && done.Consistency < row.Consistency && done.Detail == "" {
		done, err = s.waitForDetail(ctx, done)
	}
	if err != nil {
		return nil, fmt.Errorf("tag point %q: %w", row.Name, err)
	}
	return &farsidev1.TagPointResponse{Tag: &farsidev1.TagPoint{
		Id: done.ID, Name: done.Name, Consistency: farsidev1.Consistency(done.Consistency), GroupId: done.Group,
		Position: positionMessage(done.Position), TimeNs: done.Time, Detail: done.Detail,
	}}, nil
}

// newTag makes the row of a tag, but for its machine.
func (s *server) newTag(req *farsidev1.TagPointRequest) (catalog.Tag, time.Duration, error) {
	t := catalog.Tag{ID: newUUID(), Name: req.GetName(), Consistency: dr.Consistency(req.GetConsistency()), State: catalog.TagWanted}
	if err := checkName("name of tag", t.Name); err != nil {
		return t, 0, err
	}
	if t.Name == "" || len(t.Name) > dr.MaxTagName {
		return t, 0, fmt.Errorf("name of tag has %d bytes, must have 1 to %d: %w", len(t.Name), dr.MaxTagName, dr.ErrInvalid)
	}
	switch t.Consistency {
	case 0:
		t.Consistency = dr.Crash
	case dr.Crash, dr.FileSystem, dr.Application:
	default:
		return t, 0, fmt.Errorf("consistency %d: %w", t.Consistency, dr.ErrInvalid)
	}
	if req.GetRequestId() != "" {
		id, err := checkUUID("request id", req.GetRequestId())
		if err != nil {
			return t, 0, err
		}
		t.ID = id
	}
	patience, err := period("time-out in ms", req.GetTimeoutMs(), time.Millisecond, defaultPatience, maxPatience)
	t.Created = s.now().UnixNano()
	t.Deadline = t.Created + patience.Nanoseconds()
	return t, patience, err
}

// sameTag refuses a request whose id is that of another request.
func sameTag(tx *catalog.Tx, row catalog.Tag) error {
	old, err := tx.Tag(row.ID)
	if err == nil && (old.Machine != row.Machine || old.Name != row.Name) {
		err = fmt.Errorf("request id %s was used for another tag: %w", row.ID, dr.ErrExists)
	}
	return err
}

// waitForTag waits until a tag is durable.
func (s *server) waitForTag(ctx context.Context, id string, patience time.Duration) (row catalog.Tag, err error) {
	err = s.waitUntil(ctx, patience, func() (bool, error) {
		err := s.catalog.Read(ctx, func(tx *catalog.Tx) (err error) {
			row, err = tx.Tag(id)
			return err
		})
		switch {
		case err != nil || row.State == catalog.TagDurable:
			return true, err
		case row.State == catalog.TagFailed && row.Error == tagNotInTime:
			return true, fmt.Errorf("%s: %w", row.Error, errTimeout)
		case row.State == catalog.TagFailed:
			return true, fmt.Errorf("%s: %w", strings.TrimSpace(row.Error), dr.ErrUnavailable)
		}
		return false, nil
	})
	return row, err
}

// waitForDetail waits a little for the agent to say why a durable tag is less than
// was asked: its report and the master target's go different ways.
func (s *server) waitForDetail(ctx context.Context, row catalog.Tag) (catalog.Tag, error) {
	err := s.waitUntil(ctx, detailWait, func() (done bool, err error) {
		err = s.catalog.Read(ctx, func(tx *catalog.Tx) error {
			now, err := tx.Tag(row.ID)
			row.Detail = now.Detail
			return err
		})
		return row.Detail != "", err
	})
	if errors.Is(err, errTimeout) {
		return row, nil // it was placed all the same
	}
	return row, err
}
