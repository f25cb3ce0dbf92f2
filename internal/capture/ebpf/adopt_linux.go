//go:build linux && amd64

package ebpf

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"farside/internal/dr"
)

// openPinned goes on with what is pinned at o.Pin, or replaces it, or begins.
func openPinned(devs []*device, o Options) (*source, error) {
	if err := os.MkdirAll(o.Pin, 0o700); err != nil {
		return nil, fmt.Errorf("make pin directory: %w", kindOf(err))
	}
	switch is, err := isBPF(o.Pin); {
	case err != nil:
		return nil, err
	case !is:
		return nil, fmt.Errorf("pin at %s: no BPF file system: %w", o.Pin, dr.ErrInvalid)
	}
	dir, err := lockPins(o.Pin)
	if err != nil {
		return nil, err
	}
	p := &pinned{dir: dir}
	s, err := p.open(devs, o)
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	s.pins = p
	return s, nil
}

// close lets go of the pins; they stay, unless they are to be forgotten.
func (p *pinned) close() (err error) {
	err = p.cleared
	if p.memory != nil {
		err = errors.Join(err, unix.Munmap(p.memory))
	}
	p.dir.unlock()
	return err
}

func (p *pinned) open(devs []*device, o Options) (*source, error) {
	var old *loaded
	var was meta
	if p.dir.has(pinLive) {
		var err error
		// What can't be gone on with is replaced; that nothing is inherited says so.
		if old, was, err = loadPinned(p.dir); err == nil && was.equal(metaOf(devs, o)) && old.notes.Gone == 0 {
			return p.adopt(devs, o, old)
		}
	}
	s, err := p.replace(devs, o, old, was)
	if old != nil {
		err = errors.Join(err, old.close())
	}
	return s, err
}

// adopt goes on with old.
func (p *pinned) adopt(devs []*device, o Options, old *loaded) (*source, error) {
	s, err := newSource(devs, o, old)
	if err != nil {
		return nil, errors.Join(err, old.close())
	}
	if p.memory, err = openMemory(p.dir, o.Memory, false); err != nil {
		return nil, errors.Join(err, old.close())
	}
	grace() // the last process may have been killed just behind a change of the state
	place, losts := old.notes.split(old.notes.Floor)
	old.ring.release(place)
	s.standAt(place, losts)
	p.adopted = true
	for _, d := range s.disks {
		p.inherited = append(p.inherited, d.ID)
	}
	return s, nil
}

// replace makes a new capture that takes over what it can of old, if that is not nil.
func (p *pinned) replace(devs []*device, o Options, old *loaded, was meta) (*source, error) {
	if err := p.dir.begin(); err != nil {
		return nil, err
	}
	s, err := openNew(devs, o, func(s *source) error {
		if err := s.prog.pin(p.dir); err != nil {
			return err
		}
		if old == nil || atomic.LoadUint64(&old.notes.Gone) != 0 {
			return nil
		}
		var err error
		p.inherited, err = s.inherit(old, was)
		return err
	})
	if err != nil {
		return nil, errors.Join(err, p.dir.remove(pinNew))
	}
	if p.memory, err = openMemory(p.dir, o.Memory, len(p.inherited) == 0); err == nil {
		err = p.dir.commit()
	}
	if err != nil {
		return nil, errors.Join(err, s.prog.close(), p.dir.remove(pinNew))
	}
	return s, nil
}
