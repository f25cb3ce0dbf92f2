package control

import (
	"sync"
	"time"
)

// keeper writes what a node keeps on disk, without making the node wait for its
// disk: a file system may be frozen, for a moment or for good. There is at most
// one write at a time; of what has the same name only the newest is written.
type keeper struct {
	failed func(name string, err error) // called when a write failed that nobody waited for
	mu     struct {
		sync.Mutex
		waiting map[string]*write
		busy    bool
		idle    chan struct{} // closed when nothing is to be written
	}
}

type write struct {
	do   func() error
	done chan struct{}
	err  error // when done is closed
	left bool  // nobody waits
}

// keepGrace is how long a write is waited for. On a disk that works it is done by
// then, so that a restart right after knows it.
const keepGrace = 250 * time.Millisecond

// closeGrace is how long the end waits for what is still to be written.
const closeGrace = time.Second

// keep has do write what is known by a name. It returns the error of that, or nil if it takes
// longer than keepGrace: then failed hears of an error.
func (k *keeper) keep(name string, do func() error) error {
	w := &write{do: do, done: make(chan struct{})}
	k.mu.Lock()
	if k.mu.waiting == nil {
		k.mu.waiting = make(map[string]*write)
	}
	if old := k.mu.waiting[name]; old != nil {
		close(old.done) // what replaces it is newer
	}
	k.mu.waiting[name] = w
	if !k.mu.busy {
		k.mu.busy, k.mu.idle = true, make(chan struct{})
		go k.run(k.mu.idle)
	}
	k.mu.Unlock()
	t := time.NewTimer(keepGrace)
	defer t.Stop()
	select {
	case <-w.done:
		return w.err
	case <-t.C:
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	select {
	case <-w.done:
		return w.err
	default:
	}
	w.left = true
	return nil
}

// run writes until nothing waits.
func (k *keeper) run(idle chan struct{}) {
	defer close(idle)
	for {
		name, w := k.next()
		if w == nil {
			return
		}
		err := w.do()
		k.mu.Lock()
		w.err = err
		left := w.left
		close(w.done)
		k.mu.Unlock()
		if left && err != nil {
			k.failed(name, err)
		}
	}
}

func (k *keeper) next() (string, *write) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, w := range k.mu.waiting {
		delete(k.mu.waiting, name)
		return name, w
	}
	k.mu.busy = false
	return "", nil
}

// close waits a little until everything is written.
func (k *keeper) close() {
	k.mu.Lock()
	idle := k.mu.idle
	k.mu.Unlock()
	if idle == nil {
		return
	}
	select {
	case <-idle:
	case <-time.After(closeGrace):
	}
}
