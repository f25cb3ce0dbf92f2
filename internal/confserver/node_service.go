package confserver

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
	"farside/internal/dr"
	"farside/internal/transport"
)

// nodeService is what nodes call.
type nodeService struct{ *server }

// maxWait bounds how long Watch waits.
const maxWait = 25 * time.Second

// defaultWindow is how far back every write is kept if nobody says otherwise, in seconds.
const defaultWindow = 24 * 3600

// Join implements the call: it trades a token for a certificate. The same request
// again gets the same node.
func (s nodeService) Join(ctx context.Context, req *farsidev1.JoinRequest) (*farsidev1.JoinResponse, error) {
	token, err := transport.ParseToken(req.GetToken())
	if err != nil {
		return nil, fmt.Errorf("%w: %w: %w", errNoCredentials, dr.ErrDenied, err)
	}
	role, err := roleName(req.GetRole())
	if err != nil {
		return nil, err
	}
	key, err := transport.RequestedKey(req.GetCsr())
	if err != nil {
		return nil, err
	}
	if err := checkName("host name", req.GetHostname()); err != nil {
		return nil, err
	}
	now := s.now()
	var node catalog.Node
	err = s.catalog.Write(ctx, func(tx *catalog.Tx) error {
		row, err := s.checkToken(tx, token, role, keyHash(key))
		if err != nil {
			return err
		}
		if row.Used != 0 {
			node, err = tx.Node(row.UsedBy)
			return err
		}
		name := row.Name
		if name == "" {
			name = req.GetHostname()
		}
		node = catalog.Node{ID: dr.NewNodeID(), Role: row.Role, Name: name, Joined: now.UnixNano()}
		if node.Role == transport.RoleAgent {
			node.Machine = dr.NewMachineID()
		}
		node.CertificateEnds = now.Add(transport.NodeLifetime).UnixNano()
		if node.Name == "" {
			node.Name = node.ID.String()
		}
		return errors.Join(tx.AddNode(node), addMachineOf(tx, node), tx.UseJoinToken(row.ID, node.ID, keyHash(key), now.UnixNano()))
	})
	if err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	chain, err := s.issue(req.GetCsr(), node)
	if err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	s.log.Info("a node joined", "role", node.Role, "node", node.ID, "name", node.Name)
	s.hub.wake()
	r := &farsidev1.JoinResponse{
		NodeId: node.ID.String(), CertificateChain: chain, Authorities: s.ca.Authorities(), ConfigServers: s.advertise,
	}
	if !node.Machine.IsZero() {
		r.MachineId = node.Machine.String()
	}
	return r, nil
}

// checkToken returns the token's row if it may be used for the role and key, now.
// The errors do not tell whether the id or the secret was wrong.
func (s *server) checkToken(tx *catalog.Tx, token transport.Token, role string, key []byte) (catalog.JoinToken, error) {
	row, err := tx.JoinToken(uuidOf(token.ID))
	hash := token.Hash()
	switch {
	case errors.Is(err, dr.ErrNotFound), err == nil && subtle.ConstantTimeCompare(row.Hash, hash[:]) != 1:
		return row, fmt.Errorf("unknown join token: %w: %w", errNoCredentials, dr.ErrDenied)
	case err != nil:
		return row, err
	case row.Used != 0 && !bytes.Equal(row.UsedKey, key):
		return row, fmt.Errorf("the join token was used already: %w", dr.ErrDenied)
	case s.now().UnixNano() >= row.Expires:
		return row, fmt.Errorf("the join token has expired: %w", dr.ErrDenied)
	case role != row.Role:
		return row, fmt.Errorf("the join token is for a %s, not for a %s: %w", row.Role, role, dr.ErrDenied)
	}
	return row, nil
}

// addMachineOf adds the machine of an agent's node.
func addMachineOf(tx *catalog.Tx, n catalog.Node) error {
	if n.Role != transport.RoleAgent {
		return nil
	}
	return tx.AddMachine(catalog.Machine{
		ID: n.Machine, Name: n.Name, Node: n.ID, Created: n.Joined, Timeline: 1, LastTimeline: 1, HistoryWindow: defaultWindow,
	})
}

// issue signs a node's certificate. Only a master target's names host names: its
// exports are used by programs that look at them.
func (s *server) issue(csr []byte, n catalog.Node) ([][]byte, error) {
	var names []string
	if n.Role == transport.RoleMasterTarget {
		var err error
		if names, err = transport.RequestedNames(csr); err != nil {
			return nil, err
		}
	}
	return s.ca.Issue(csr, transport.Peer{Role: n.Role, Node: n.ID, Machine: n.Machine}, transport.NodeLifetime, names...)
}

// Renew implements the call.
func (s nodeService) Renew(ctx context.Context, req *farsidev1.RenewRequest) (*farsidev1.RenewResponse, error) {
	node := callerOf(ctx).node
	chain, err := s.issue(req.GetCsr(), node)
	if err != nil {
		return nil, fmt.Errorf("renew: %w", err)
	}
	err = s.catalog.Write(ctx, func(tx *catalog.Tx) error {
		return tx.SetCertificate(node.ID, s.now().Add(transport.NodeLifetime).UnixNano())
	})
	if err != nil {
		return nil, fmt.Errorf("renew: %w", err)
	}
	return &farsidev1.RenewResponse{CertificateChain: chain, Authorities: s.ca.Authorities()}, nil
}

// Watch implements the call: a long poll.
func (s nodeService) Watch(ctx context.Context, req *farsidev1.WatchRequest) (*farsidev1.WatchResponse, error) {
	wait := maxWait
	if ms := req.GetWaitMs(); ms < 0 {
		return nil, fmt.Errorf("wait of %d ms: %w", ms, dr.ErrInvalid)
	} else if ms > 0 && ms < maxWait.Milliseconds() {
		wait = time.Duration(ms) * time.Millisecond
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	node := callerOf(ctx).node.ID
	for {
		changed := s.hub.node(node)
		a, err := s.assignment(ctx, node)
		if err != nil {
			return nil, fmt.Errorf("watch: %w", err)
		}
		if a.GetRevision() != req.GetRevision() {
			return &farsidev1.WatchResponse{Assignment: a}, nil
		}
		select {
		case <-changed:
		case <-timer.C:
			return &farsidev1.WatchResponse{}, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-s.stopping.Done():
			return nil, fmt.Errorf("watch: the configuration server is stopping: %w", dr.ErrUnavailable)
		}
	}
}

// assignment returns a node's assignment with its revision.
func (s *server) assignment(ctx context.Context, id dr.NodeID) (a *farsidev1.Assignment, err error) {
	var current bool
	err = s.catalog.Read(ctx, func(tx *catalog.Tx) (err error) {
		a, current, err = s.revision(tx, id)
		return err
	})
	if err == nil && !current {
		err = s.catalog.Write(ctx, func(tx *catalog.Tx) (err error) {
			a, err = s.revise(tx, id)
			return err
		})
	}
	return a, err
}

// revision returns a node's assignment with the newest revision that was given
// out, and whether that is still the revision of this content.
func (s *server) revision(tx *catalog.Tx, id dr.NodeID) (a *farsidev1.Assignment, current bool, err error) {
	p, err := s.plan(tx, id)
	if err != nil {
		return nil, false, err
	}
	a = assign(p)
	digest, err := digestOf(a)
	if err != nil {
		return nil, false, err
	}
	last, err := tx.Assignment(id)
	a.Revision = last.Revision
	return a, last.Revision != 0 && bytes.Equal(last.Digest, digest), err
}

// revise returns a node's assignment with a revision that is higher than before
// if the content has changed.
func (s *server) revise(tx *catalog.Tx, id dr.NodeID) (*farsidev1.Assignment, error) {
	a, current, err := s.revision(tx, id)
	if err != nil || current {
		return a, err
	}
	last := a.Revision
	a.Revision = 0
	digest, err := digestOf(a)
	if err != nil {
		return nil, err
	}
	// By the clock, so that it is beyond any revision that a catalog, since lost and
	// restored from a backup, gave out.
	a.Revision = max(last+1, uint64(s.now().UnixMilli()))
	return a, tx.SaveAssignment(id, catalog.Assignment{Revision: a.Revision, Digest: digest})
}

// digestOf names the content of an assignment that has no revision yet.
func digestOf(a *farsidev1.Assignment) ([]byte, error) {
	text, err := proto.MarshalOptions{Deterministic: true}.Marshal(a)
	if err != nil {
		return nil, fmt.Errorf("marshal assignment: %w", err)
	}
	sum := sha256.Sum256(text)
	return sum[:], nil
}

// plan collects what a node's assignment follows from.
func (s *server) plan(tx *catalog.Tx, id dr.NodeID) (plan, error) {
	node, err := tx.Node(id)
	if err != nil {
		return plan{}, err
	}
	p := plan{
		node: node, configServers: s.advertise, authorities: s.ca.Authorities(), reportEvery: s.config.ReportEvery,
		addresses: make(map[dr.NodeID][]string),
	}
	var machines []catalog.Machine
	switch node.Role {
	case transport.RoleAgent:
		var m catalog.Machine
		m, err = tx.Machine(node.Machine)
		machines = append(machines, m)
	case transport.RoleProcessServer:
		if machines, err = tx.MachinesVia(id); err == nil {
			p.groups, err = groupsLedBy(tx, id)
		}
	case transport.RoleMasterTarget:
		if machines, err = tx.MachinesAt(id); err == nil {
			p.views, err = tx.ViewsAt(id)
		}
	}
	if err != nil {
		return plan{}, err
	}
	for _, m := range machines {
		rows := machineRows{Machine: m}
		if rows.disks, err = tx.Disks(m.ID); err != nil {
			return plan{}, err
		}
		if node.Role == transport.RoleAgent {
			if rows.tags, err = tx.TagsWanted(m.ID); err != nil {
				return plan{}, err
			}
		}
		p.machines = append(p.machines, rows)
		for _, peer := range []dr.NodeID{m.ProcessServer, m.MasterTarget} {
			if r := s.report(peer); r != nil {
				p.addresses[peer] = r.GetAddresses()
			}
		}
	}
	return p, nil
}
