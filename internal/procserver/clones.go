package procserver

import (
	"fmt"
	"sync"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/link"
)

// clones tells a machine that was restarted from a copy of it that runs beside it with the
// same certificate: a virtual machine that was cloned, or a replica with a way to the
// primary site. It remembers which boot of a machine sent last. It is safe for concurrent use.
type clones struct {
	notice func(code string, severity pb.Severity, text string)

	mu struct {
		sync.Mutex
		last map[dr.MachineID]*sender
	}
}

// sender is the boot of a machine that may send.
type sender struct {
	timeline dr.Timeline // a failover chooses anew who the machine is
	boot     link.Boot   // zero: it did not say
	seen     time.Time   // when something came from it last
	refused  [16]byte    // the boot that was told of last
	told     time.Time   // when
}

const (
	// aliveFor is how long one that was silent keeps others out: longer than a connection takes to
	// end and come back.
	aliveFor = 2 * time.Minute
	// bootSlack is by how much a boot may seem to lie before the last that came from the boot before
	// it, which the network held.
	bootSlack = 5 * time.Second
	// tellAgain is how often a clone that goes on trying is told of.
	tellAgain = time.Hour
)

// admit decides whether a sender may take the place of the one before. Two boots of one
// machine follow each other; if one that began before the other was heard of last, both run.
func (c *clones) admit(h link.Hello, now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.last == nil {
		c.mu.last = map[dr.MachineID]*sender{}
	}
	s := c.mu.last[h.Machine]
	if s == nil || s.timeline != h.Timeline {
		s = &sender{timeline: h.Timeline, boot: h.Boot, seen: now}
		c.mu.last[h.Machine] = s
	}
	if s.boot.ID != h.Boot.ID && h.Boot.ID != ([16]byte{}) && s.boot.ID != ([16]byte{}) {
		beside := now.Add(-h.Boot.Up).Add(bootSlack).Before(s.seen)
		if beside && now.Sub(s.seen) < aliveFor {
			err := cloneError(h)
			if s.refused != h.Boot.ID || now.Sub(s.told) >= tellAgain {
				s.refused, s.told = h.Boot.ID, now
				c.notice("machine-cloned", pb.Severity_SEVERITY_ERROR, err.Error())
			}
			return err
		}
		if beside {
			c.notice("machine-changed", pb.Severity_SEVERITY_WARNING, fmt.Sprintf(
				"machine %v: the system that sent is silent, and another one that ran beside it takes its place; if it is a clone, stop its agent", h.Machine))
		}
	}
	s.boot, s.seen = h.Boot, now
	return nil
}

func cloneError(h link.Hello) error {
	return fmt.Errorf("machine %v runs twice: a system of boot %v, up for %s, has its identity while the one that is protected goes on; "+
		"it is a clone: stop its agent, remove the agent's data directory there, and join it with a token of its own: %w",
		h.Machine, dr.NodeID(h.Boot.ID), h.Boot.Up.Round(time.Second), dr.ErrDenied)
}

// heard notes that the machine's sender is alive.
func (c *clones) heard(id dr.MachineID, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.mu.last[id]; s != nil {
		s.seen = now
	}
}
