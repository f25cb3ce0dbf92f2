package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"sync"
)

const (
	pageSize = 4096
	sector   = 512
)

// Mem is a file system in memory that knows what is durable. The root is
// there from the start.
//
// Its model of a power cut: the content of a file is what was synced, plus for
// each 512-byte sector written since either the old or the new bytes; its size
// is the synced one or any on the way to the newest. The entries of a directory are what was synced plus a
// prefix of the changes made to it since; a rename within one directory is one
// change, one between two directories is a change of each.
type Mem struct {
	mu struct {
		sync.Mutex
		root  *node
		locks map[string]bool
	}
}

// NewMem returns an empty file system.
func NewMem() *Mem {
	m := &Mem{}
	m.mu.root = newDir()
	m.mu.locks = map[string]bool{}
	return m
}

type page = [pageSize]byte

// node is a file or a directory. Pages are never written once they are also in
// synced: a write replaces them by a copy.
type node struct {
	dir bool

	size, syncedSize int64
	pages, synced    map[int64]*page // by page number; absent: zeroes

	entries, durable map[string]*node
	pending          []change // since the last SyncDir, oldest first
}

// change is one atomic change of a directory: some names get a node, or none.
type change map[string]*node

func newDir() *node {
	return &node{dir: true, entries: map[string]*node{}, durable: map[string]*node{}}
}

func newFile() *node {
	return &node{pages: map[int64]*page{}, synced: map[int64]*page{}}
}

func (d *node) apply(c change) {
	applyTo(d.entries, c)
	d.pending = append(d.pending, c)
}

func applyTo(entries map[string]*node, c change) {
	for name, n := range c {
		if n == nil {
			delete(entries, name)
		} else {
			entries[name] = n
		}
	}
}

// Crash returns what a power cut now would leave; m itself goes on. The seed
// decides about everything that was not synced.
func (m *Mem) Crash(seed uint64) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := NewMem()
	rng := rand.New(rand.NewPCG(seed, 0xfa4))
	c.mu.root = m.mu.root.crash(rng, map[*node]*node{})
	return c
}

// crash copies what is left of n; done keeps one copy of a node that two
// directories hold.
func (n *node) crash(rng *rand.Rand, done map[*node]*node) *node {
	if c := done[n]; c != nil {
		return c
	}
	if !n.dir {
		c := n.crashFile(rng)
		done[n] = c
		return c
	}
	c := newDir()
	done[n] = c
	left := maps.Clone(n.durable)
	for _, ch := range n.pending[:rng.IntN(len(n.pending)+1)] {
		applyTo(left, ch)
	}
	for _, name := range slices.Sorted(maps.Keys(left)) {
		child := left[name].crash(rng, done)
		c.entries[name], c.durable[name] = child, child
	}
	return c
}

func (n *node) crashFile(rng *rand.Rand) *node {
	c := newFile()
	c.size = n.syncedSize
	if n.size != n.syncedSize {
		low, high := min(n.size, n.syncedSize), max(n.size, n.syncedSize)
		c.size = []int64{low, high, low + rng.Int64N(high-low+1)}[rng.IntN(3)]
	}
	numbers := slices.Sorted(maps.Keys(n.pages))
	for no := range n.synced {
		if n.pages[no] == nil {
			numbers = append(numbers, no)
		}
	}
	slices.Sort(numbers)
	for _, no := range numbers {
		c.pages[no] = mix(n.synced[no], n.pages[no], rng)
	}
	c.cut(c.size)
	c.sync()
	return c
}

// mix takes each sector that differs from one of the two pages.
func mix(old, now *page, rng *rand.Rand) *page {
	if old == now {
		return old
	}
	var a, b page
	if old != nil {
		a = *old
	}
	if now != nil {
		b = *now
	}
	for i := 0; i < pageSize; i += sector {
		if [sector]byte(a[i:]) != [sector]byte(b[i:]) && rng.IntN(2) == 0 {
			copy(a[i:i+sector], b[i:])
		}
	}
	return &a
}

func (n *node) sync() {
	n.synced = maps.Clone(n.pages)
	n.syncedSize = n.size
}

// cut drops what lies behind size.
func (n *node) cut(size int64) {
	n.size = size
	for no, p := range n.pages {
		switch start := no * pageSize; {
		case start >= size:
			delete(n.pages, no)
		case start+pageSize > size:
			q := *p
			clear(q[size-start:])
			n.pages[no] = &q
		}
	}
}

func (n *node) write(p []byte, off int64) {
	n.size = max(n.size, off+int64(len(p)))
	for len(p) > 0 {
		no, at := off/pageSize, off%pageSize
		q := n.pages[no]
		switch {
		case q == nil:
			q = new(page)
		case q == n.synced[no]:
			c := *q
			q = &c
		}
		n.pages[no] = q
		k := copy(q[at:], p)
		p = p[k:]
		off += int64(k)
	}
}

func (n *node) read(p []byte, off int64) (int, error) {
	want := min(int64(len(p)), n.size-off)
	if want <= 0 {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	for done := int64(0); done < want; {
		no, at := (off+done)/pageSize, (off+done)%pageSize
		k := min(pageSize-at, want-done)
		if q := n.pages[no]; q != nil {
			copy(p[done:done+k], q[at:])
		} else {
			clear(p[done : done+k])
		}
		done += k
	}
	if want < int64(len(p)) {
		return int(want), io.EOF
	}
	return int(want), nil
}

func pathErr(op, name string, err error) error {
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// find returns the node at name, or nil.
func (m *Mem) find(name string) *node {
	name = path.Clean("/" + name)
	n := m.mu.root
	for part := range splitPath(name) {
		if n == nil || !n.dir {
			return nil
		}
		n = n.entries[part]
	}
	return n
}

func splitPath(clean string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for len(clean) > 1 {
			clean = clean[1:]
			end := slices.Index([]byte(clean), '/')
			if end < 0 {
				end = len(clean)
			}
			if !yield(clean[:end]) {
				return
			}
			clean = clean[end:]
		}
	}
}

// parent returns the directory that name lies in.
func (m *Mem) parent(op, name string) (*node, string, error) {
	clean := path.Clean("/" + name)
	d := m.find(path.Dir(clean))
	if d == nil || !d.dir || clean == "/" {
		return nil, "", pathErr(op, name, fs.ErrNotExist)
	}
	return d, path.Base(clean), nil
}

// Create implements FS.
func (m *Mem) Create(name string) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, base, err := m.parent("create", name)
	if err != nil {
		return nil, err
	}
	n := d.entries[base]
	switch {
	case n == nil:
		n = newFile()
		d.apply(change{base: n})
	case n.dir:
		return nil, pathErr("create", name, errors.New("is a directory"))
	default:
		n.cut(0)
	}
	return &memFile{m: m, n: n, name: name, writable: true}, nil
}

// Open implements FS.
func (m *Mem) Open(name string) (File, error) { return m.open(name, false) }

// OpenFile implements FS.
func (m *Mem) OpenFile(name string) (File, error) { return m.open(name, true) }

func (m *Mem) open(name string, writable bool) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.find(name)
	if n == nil {
		return nil, pathErr("open", name, fs.ErrNotExist)
	}
	if n.dir {
		return nil, pathErr("open", name, errors.New("is a directory"))
	}
	return &memFile{m: m, n: n, name: name, writable: writable}, nil
}

// Remove implements FS.
func (m *Mem) Remove(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, base, err := m.parent("remove", name)
	if err != nil {
		return err
	}
	n := d.entries[base]
	if n == nil {
		return pathErr("remove", name, fs.ErrNotExist)
	}
	if n.dir && len(n.entries) > 0 {
		return pathErr("remove", name, errors.New("directory not empty"))
	}
	d.apply(change{base: nil})
	return nil
}

// RemoveAll implements FS.
func (m *Mem) RemoveAll(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, base, err := m.parent("remove", name)
	if err != nil || d.entries[base] == nil {
		return nil //nolint:nilerr // what is not there is removed
	}
	d.entries[base].removeAll()
	d.apply(change{base: nil})
	return nil
}

// removeAll empties a directory, bottom up, as a caller without RemoveAll would.
func (n *node) removeAll() {
	for _, name := range slices.Sorted(maps.Keys(n.entries)) {
		n.entries[name].removeAll()
		n.apply(change{name: nil})
	}
}

// Rename implements FS.
func (m *Mem) Rename(from, to string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d1, base1, err := m.parent("rename", from)
	if err != nil {
		return err
	}
	d2, base2, err := m.parent("rename", to)
	if err != nil {
		return err
	}
	n := d1.entries[base1]
	switch old := d2.entries[base2]; {
	case n == nil:
		return pathErr("rename", from, fs.ErrNotExist)
	case old == n:
		return nil
	case old != nil && (old.dir || n.dir):
		return pathErr("rename", to, fs.ErrExist)
	}
	if d1 == d2 {
		d1.apply(change{base1: nil, base2: n})
		return nil
	}
	d2.apply(change{base2: n})
	d1.apply(change{base1: nil})
	return nil
}

// MkdirAll implements FS.
func (m *Mem) MkdirAll(dir string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.mu.root
	for part := range splitPath(path.Clean("/" + dir)) {
		next := n.entries[part]
		if next == nil {
			next = newDir()
			n.apply(change{part: next})
		}
		if !next.dir {
			return pathErr("mkdir", dir, errors.New("not a directory"))
		}
		n = next
	}
	return nil
}

// SyncDir implements FS.
func (m *Mem) SyncDir(dir string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.find(dir)
	if n == nil || !n.dir {
		return pathErr("sync", dir, fs.ErrNotExist)
	}
	n.durable, n.pending = maps.Clone(n.entries), nil
	return nil
}

// List implements FS.
func (m *Mem) List(dir string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.find(dir)
	if n == nil || !n.dir {
		return nil, pathErr("list", dir, fs.ErrNotExist)
	}
	return slices.Sorted(maps.Keys(n.entries)), nil
}

// Stat implements FS.
func (m *Mem) Stat(name string) (Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.find(name)
	if n == nil {
		return Info{}, pathErr("stat", name, fs.ErrNotExist)
	}
	return Info{Size: n.size, Dir: n.dir}, nil
}

// Lock implements FS.
func (m *Mem) Lock(name string) (io.Closer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, base, err := m.parent("lock", name)
	if err != nil {
		return nil, err
	}
	clean := path.Clean("/" + name)
	if m.mu.locks[clean] {
		return nil, fmt.Errorf("lock %s: in use", name)
	}
	m.mu.locks[clean] = true
	if d.entries[base] == nil {
		d.apply(change{base: newFile()})
	}
	return memLock{m, clean}, nil
}

type memLock struct {
	m    *Mem
	name string
}

func (l memLock) Close() error {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	delete(l.m.mu.locks, l.name)
	return nil
}
