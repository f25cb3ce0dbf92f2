package nbd

import (
	"context"
	"math/bits"
	"sync"

	"golang.org/x/sync/semaphore"
)

// headRoom is kept free in front of the data of a buffer, so that the header
// of a reply and its data leave in one piece.
const headRoom = 32

// buffer is a pooled piece of memory that counts against the server's memory.
//
//	mem: | headRoom | data ... |
type buffer struct {
	mem   []byte
	n     int // bytes of data in use
	class int // log2 of the room for data, and its cost
}

// data is the part that holds the payload.
func (b *buffer) data() []byte { return b.mem[headRoom : headRoom+b.n] }

// withHead returns n bytes of header followed by the data, contiguous.
func (b *buffer) withHead(n int) []byte { return b.mem[headRoom-n : headRoom+b.n] }

const (
	minClass = 12 // 4 KiB
	maxClass = 25 // MaxRequest
)

// memory hands out buffers of a server and bounds their sum.
type memory struct {
	budget *semaphore.Weighted
	pools  [maxClass + 1]sync.Pool
}

func newMemory(limit int64) *memory {
	return &memory{budget: semaphore.NewWeighted(limit)}
}

// get returns a buffer for n <= MaxRequest bytes. It waits while the budget
// is used up, until ctx ends.
func (m *memory) get(ctx context.Context, n int) (*buffer, error) {
	class := classOf(n)
	if err := m.budget.Acquire(ctx, 1<<class); err != nil {
		return nil, err
	}
	return m.take(class, n), nil
}

// tryGet is get without waiting: it returns nil.
func (m *memory) tryGet(n int) *buffer {
	class := classOf(n)
	if !m.budget.TryAcquire(1 << class) {
		return nil
	}
	return m.take(class, n)
}

func classOf(n int) int { return max(minClass, bits.Len(uint(max(n, 1)-1))) }

func (m *memory) take(class, n int) *buffer {
	b, _ := m.pools[class].Get().(*buffer)
	if b == nil {
		b = &buffer{mem: make([]byte, headRoom+1<<class), class: class}
	}
	b.n = n
	return b
}

func (m *memory) put(b *buffer) {
	if b == nil {
		return
	}
	m.budget.Release(1 << b.class)
	m.pools[b.class].Put(b)
}
