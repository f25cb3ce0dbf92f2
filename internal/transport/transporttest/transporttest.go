// Package transporttest gives tests a deployment's CA and identities in memory.
//
// Main type: Site. It does not touch files or the network. A Site may be used by
// several goroutines.
package transporttest

import (
	"testing"
	"time"

	"farside/internal/dr"
	"farside/internal/transport"
)

// Site is a deployment: a CA whose identities trust each other.
type Site struct {
	t   testing.TB
	CA  *transport.CA
	now func() time.Time
}

// NewSite makes a site. now tells the time to all its identities; nil means time.Now.
func NewSite(t testing.TB, now func() time.Time) *Site {
	t.Helper()
	ca, err := transport.NewCA(now)
	if err != nil {
		t.Fatal(err)
	}
	return &Site{t: t, CA: ca, now: now}
}

// Identity makes an identity with random ids; an agent gets a machine id too.
func (s *Site) Identity(role string) *transport.Identity {
	s.t.Helper()
	p := transport.Peer{Role: role, Node: dr.NewNodeID()}
	if role == transport.RoleAgent {
		p.Machine = dr.NewMachineID()
	}
	return s.Issue(p, transport.NodeLifetime)
}

// Agent makes the identity of an agent of the machine.
func (s *Site) Agent(m dr.MachineID) *transport.Identity {
	s.t.Helper()
	return s.Issue(transport.Peer{Role: transport.RoleAgent, Node: dr.NewNodeID(), Machine: m}, transport.NodeLifetime)
}

// Issue makes an identity for who that lasts for ttl.
func (s *Site) Issue(who transport.Peer, ttl time.Duration) *transport.Identity {
	s.t.Helper()
	key, csr, err := transport.NewRequest()
	if err != nil {
		s.t.Fatal(err)
	}
	chain, err := s.CA.Issue(csr, who, ttl)
	if err != nil {
		s.t.Fatal(err)
	}
	id, err := transport.NewIdentity(key, chain, s.CA.Authorities(), s.now)
	if err != nil {
		s.t.Fatal(err)
	}
	return id
}
