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
	"farside/internal/transport"
)

// farsideService is what people and their programs call.
type farsideService struct{ *server }

// Bounds and defaults of what people ask for.
const (
	defaultTokenLife  = time.Hour
	maxTokenLife      = 30 * 24 * time.Hour
	defaultClientLife = time.Hour
	maxClientLife     = 24 * time.Hour
	defaultPatience   = time.Minute
	maxPatience       = time.Hour
)

// period returns a duration that was asked for in some unit, within bounds.
func period(what string, n int64, unit, normal, most time.Duration) (time.Duration, error) {
	switch {
	case n == 0:
		return normal, nil
	case n < 0 || n > int64(most/unit):
		return 0, fmt.Errorf("%s of %d: must be at most %s: %w", what, n, most, dr.ErrInvalid)
	}
	return time.Duration(n) * unit, nil
}

// GetServer implements the call.
func (s farsideService) GetServer(ctx context.Context, _ *farsidev1.GetServerRequest) (*farsidev1.GetServerResponse, error) {
	u := callerOf(ctx).user
	return &farsidev1.GetServerResponse{
		Version: version(), TimeNs: s.now().UnixNano(), Addresses: s.advertise, User: u.Name, UserRole: u.Role,
	}, nil
}

// CreateToken implements the call.
func (s farsideService) CreateToken(ctx context.Context, req *farsidev1.CreateTokenRequest) (*farsidev1.CreateTokenResponse, error) {
	role, err := roleName(req.GetRole())
	if err != nil {
		return nil, fmt.Errorf("create token: %w", err)
	}
	ttl, err := period("life of the token in seconds", req.GetTtlSeconds(), time.Second, defaultTokenLife, maxTokenLife)
	if err != nil {
		return nil, fmt.Errorf("create token: %w", err)
	}
	if err := checkName("name", req.GetName()); err != nil {
		return nil, fmt.Errorf("create token: %w", err)
	}
	token, err := transport.NewToken(s.ca.Fingerprint(), role, s.advertise)
	if err != nil {
		return nil, fmt.Errorf("create token: %w", err)
	}
	now, hash := s.now(), token.Hash()
	row := catalog.JoinToken{
		ID: uuidOf(token.ID), Hash: hash[:], Role: role, Name: req.GetName(),
		Created: now.UnixNano(), Expires: now.Add(ttl).UnixNano(),
	}
	if err := s.catalog.Write(ctx, func(tx *catalog.Tx) error { return tx.AddJoinToken(row) }); err != nil {
		return nil, fmt.Errorf("create token: %w", err)
	}
	s.log.Info("a join token was made", "token", row.ID, "role", role, "by", callerOf(ctx).user.Name)
	return &farsidev1.CreateTokenResponse{Token: token.Text(), TokenId: row.ID, ExpiresNs: row.Expires}, nil
}

// ListNodes implements the call.
func (s farsideService) ListNodes(ctx context.Context, req *farsidev1.ListNodesRequest) (*farsidev1.ListNodesResponse, error) {
	role, err := roleName(req.GetRole())
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	limit, after, err := page(req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	res := &farsidev1.ListNodesResponse{}
	err = s.catalog.Read(ctx, func(tx *catalog.Tx) error {
		rows, err := tx.Nodes(role, after, limit)
		if err != nil {
			return err
		}
		for _, row := range rows {
			a, err := tx.Assignment(row.ID)
			if err != nil {
				return err
			}
			res.Nodes = append(res.Nodes, s.nodeMessage(row, a.Revision))
		}
		if len(rows) == limit {
			last := rows[len(rows)-1]
			res.NextPageToken = pageToken(catalog.Cursor{Name: last.Name, ID: last.ID.String()})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	return res, nil
}

func (s *server) nodeMessage(row catalog.Node, revision uint64) *farsidev1.Node {
	n := &farsidev1.Node{
		Id: row.ID.String(), Role: roleNumber(row.Role), Name: row.Name, JoinedNs: row.Joined,
		CertificateExpiresNs: row.CertificateEnds, AssignmentRevision: revision,
	}
	if !row.Machine.IsZero() {
		n.MachineId = row.Machine.String()
	}
	r := s.report(row.ID)
	if r == nil {
		return n
	}
	n.Host, n.Version, n.Addresses, n.Notices = r.GetHost(), r.GetVersion(), r.GetAddresses(), r.GetNotices()
	n.LastSeenNs, n.Online = r.received.UnixNano(), s.online(r)
	n.ReportedAssignmentRevision = r.GetAssignmentRevision()
	n.ClockOffsetMs = (r.GetClockNs() - r.received.UnixNano()) / int64(time.Millisecond)
	n.ProcessServer = r.GetProcessServer()
	n.DiskFreeBytes = r.GetProcessServer().GetDiskFreeBytes() + r.GetMasterTarget().GetDiskFreeBytes()
	n.DiskTotalBytes = r.GetMasterTarget().GetDiskTotalBytes()
	return n
}

// IssueClientCertificate implements the call.
func (s farsideService) IssueClientCertificate(ctx context.Context, req *farsidev1.IssueClientCertificateRequest) (*farsidev1.IssueClientCertificateResponse, error) {
	ttl, err := period("life of the certificate in seconds", req.GetTtlSeconds(), time.Second, defaultClientLife, maxClientLife)
	if err != nil {
		return nil, fmt.Errorf("issue client certificate: %w", err)
	}
	who := transport.Peer{Role: transport.RoleClient, Node: dr.NewNodeID()}
	chain, err := s.ca.Issue(req.GetCsr(), who, ttl)
	if err != nil {
		return nil, fmt.Errorf("issue client certificate: %w", err)
	}
	s.log.Info("a client certificate was issued", "client", who.Node, "for", ttl, "by", callerOf(ctx).user.Name)
	return &farsidev1.IssueClientCertificateResponse{
		CertificateChain: chain, Authorities: s.ca.Authorities(), ExpiresNs: s.now().Add(ttl).UnixNano(),
	}, nil
}

// findMachine finds a machine by id or by a name that only it has.
func findMachine(tx *catalog.Tx, key string) (catalog.Machine, error) {
	if key == "" {
		return catalog.Machine{}, fmt.Errorf("no machine is named: %w", dr.ErrInvalid)
	}
	if id, err := dr.ParseMachineID(key); err == nil {
		return tx.Machine(id)
	}
	return only("machine", key, tx.MachinesNamed, func(m catalog.Machine) string { return m.ID.String() })
}

// findNode finds a node of a role by id or by a name that only it has in that role.
func findNode(tx *catalog.Tx, role, key string) (catalog.Node, error) {
	if id, err := dr.ParseNodeID(key); err == nil {
		n, err := tx.Node(id)
		if err == nil && n.Role != role {
			err = fmt.Errorf("node %s is a %s, not a %s: %w", id, n.Role, role, dr.ErrInvalid)
		}
		return n, err
	}
	named := func(name string) ([]catalog.Node, error) { return tx.NodesNamed(role, name) }
	return only(role, key, named, func(n catalog.Node) string { return n.ID.String() })
}

// findView finds a view by id or by a name that only it has.
func findView(tx *catalog.Tx, key string) (catalog.View, error) {
	if id, err := checkUUID("view", key); err == nil {
		return tx.View(id)
	}
	if key == "" {
		return catalog.View{}, fmt.Errorf("no view is named: %w", dr.ErrInvalid)
	}
	return only("view", key, tx.ViewsNamed, func(v catalog.View) string { return v.ID })
}

// only returns the one thing with a name.
func only[T any](what, name string, find func(string) ([]T, error), id func(T) string) (T, error) {
	var none T
	all, err := find(name)
	switch {
	case err != nil:
		return none, err
	case len(all) == 0:
		return none, fmt.Errorf("%s %q: %w", what, name, dr.ErrNotFound)
	case len(all) == 1:
		return all[0], nil
	}
	var ids []string
	for _, v := range all {
		ids = append(ids, id(v))
	}
	slices.Sort(ids)
	return none, fmt.Errorf("%d things are called %s %q, name one by its id: %s: %w",
		len(all), what, name, strings.Join(ids, ", "), dr.ErrInvalid)
}

// waitUntil looks again at each change until look says that it is done, or the
// time is over: then the error wraps errTimeout.
func (s *server) waitUntil(ctx context.Context, patience time.Duration, look func() (done bool, err error)) error {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		changed := s.hub.anything()
		done, err := look()
		if done || err != nil {
			return err
		}
		select {
		case <-changed:
		case <-timer.C:
			return fmt.Errorf("after %s: %w", patience, errTimeout)
		case <-ctx.Done():
			return errors.Join(errTimeout, ctx.Err())
		case <-s.stopping.Done():
			return fmt.Errorf("the configuration server is stopping: %w", dr.ErrUnavailable)
		}
	}
}
