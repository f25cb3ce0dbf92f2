package confserver

import (
	"sync"

	"farside/internal/dr"
)

// hub wakes those who wait for a change. A wake-up says only "look again": it may
// come without cause, and who takes the channel before looking misses none.
type hub struct {
	mu struct {
		sync.Mutex
		nodes map[dr.NodeID]chan struct{} // only of nodes that somebody waits for
		any   chan struct{}
	}
}

func newHub() *hub {
	h := &hub{}
	h.mu.nodes = make(map[dr.NodeID]chan struct{})
	h.mu.any = make(chan struct{})
	return h
}

// node returns a channel that is closed when a node's assignment may have changed.
func (h *hub) node(id dr.NodeID) <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	c, ok := h.mu.nodes[id]
	if !ok {
		c = make(chan struct{})
		h.mu.nodes[id] = c
	}
	return c
}

// anything returns a channel that is closed when anything may have changed.
func (h *hub) anything() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mu.any
}

// wake wakes those who wait for the nodes, and those who wait for anything.
func (h *hub) wake(nodes ...dr.NodeID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, id := range nodes {
		if c, ok := h.mu.nodes[id]; ok {
			close(c)
			delete(h.mu.nodes, id)
		}
	}
	close(h.mu.any)
	h.mu.any = make(chan struct{})
}
