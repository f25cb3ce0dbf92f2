package vault

import (
	"container/list"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"

	"farside/internal/frame"
)

// Cache bounds the memory that vaults use to read: decoded blocks, frame
// tables, resolved ranges of views and blocks of the index. Vaults of one
// process share one. It is safe for concurrent use.
type Cache struct {
	blocks [cacheShards]cacheShard // of cachedBlock; apart, since they would push out all else
	maps   [cacheShards]cacheShard // of the other kinds
	ids    atomic.Uint64
	index  *pebble.Cache

	buffers sync.Pool // of *[frame.BlockSize]byte, for stored blocks
}

const (
	cacheShards = 32
	// DefaultCacheBytes is the size of a vault's cache when none is given.
	DefaultCacheBytes = 256 << 20
)

// cacheKind says what an entry of the cache holds.
type cacheKind uint8

const (
	cachedBlock  cacheKind = iota // []byte: a decoded block; owner is a segment
	cachedTables                  // *frameTables; owner is a segment
	cachedChunk                   // []piece: a resolved range; owner is a state
)

// cacheKey names an entry. Owners get their number from Cache.owner, and never
// twice the same, so what belongs to a dead owner is never found again.
type cacheKey struct {
	owner uint64
	at    uint64
	part  uint32
	kind  cacheKind
}

type cacheShard struct {
	mu struct {
		sync.Mutex
		entries map[cacheKey]*list.Element
		order   list.List // most recently used first
		bytes   int64
	}
	limit int64
}

type cacheEntry struct {
	key   cacheKey
	value any
	bytes int64
}

// NewCache returns a cache of about that many bytes. The caller closes it
// after the vaults that use it.
func NewCache(bytes int64) *Cache {
	c := &Cache{index: pebble.NewCache(bytes / 4)}
	c.buffers.New = func() any { return new([frame.BlockSize]byte) }
	for i := range cacheShards {
		c.blocks[i].limit, c.maps[i].limit = bytes/2/cacheShards, bytes/4/cacheShards
		c.blocks[i].mu.entries = map[cacheKey]*list.Element{}
		c.maps[i].mu.entries = map[cacheKey]*list.Element{}
	}
	return c
}

// Close frees the cache.
func (c *Cache) Close() { c.index.Unref() }

// owner returns a number that was never given out before.
func (c *Cache) owner() uint64 {
	if c == nil { // nothing will be cached
		return 0
	}
	return c.ids.Add(1)
}

func (c *Cache) shard(k cacheKey) *cacheShard {
	h := (k.owner*0x9e3779b97f4a7c15 ^ k.at) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>29 ^ uint64(k.part)<<8 ^ uint64(k.kind)) * 0x94d049bb133111eb
	if k.kind == cachedBlock {
		return &c.blocks[h>>59%cacheShards]
	}
	return &c.maps[h>>59%cacheShards]
}

func (c *Cache) get(k cacheKey) (any, bool) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.mu.entries[k]
	if !ok {
		return nil, false
	}
	s.mu.order.MoveToFront(e)
	return e.Value.(*cacheEntry).value, true
}

// put keeps v, whose memory must not change any more.
func (c *Cache) put(k cacheKey, v any, bytes int64) {
	bytes += 160 // the entry itself
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := s.mu.entries[k]; ok {
		s.removeLocked(e)
	}
	s.mu.entries[k] = s.mu.order.PushFront(&cacheEntry{k, v, bytes})
	s.mu.bytes += bytes
	for s.mu.bytes > s.limit && s.mu.order.Len() > 1 {
		s.removeLocked(s.mu.order.Back())
	}
}

func (c *Cache) drop(k cacheKey) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := s.mu.entries[k]; ok {
		s.removeLocked(e)
	}
}

func (s *cacheShard) removeLocked(e *list.Element) {
	entry := s.mu.order.Remove(e).(*cacheEntry)
	delete(s.mu.entries, entry.key)
	s.mu.bytes -= entry.bytes
}
