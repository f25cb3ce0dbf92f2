package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

const (
	maxErrorChunk  = 6 + maxString + 8
	maxStatusChunk = 4 + 8<<17
	// maxPieces bounds the parts of a read that a server may answer in
	// disorder.
	maxPieces = 4096
)

// replies reads what the server answers until the connection ends. It never
// returns nil.
func (c *Client) replies() error {
	for {
		if err := c.oneReply(); err != nil {
			return fmt.Errorf("read reply: %w", err)
		}
	}
}

// oneReply reads a simple reply or one chunk of a structured one.
func (c *Client) oneReply() error {
	head, err := c.r.Peek(simpleSize)
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	switch magic := binary.BigEndian.Uint32(head); {
	case magic == magicSimple:
		return c.simple(head)
	case magic == magicStructured && c.structured:
		return c.chunk()
	default:
		return fmt.Errorf("bad magic %#x", magic)
	}
}

// find returns the call in flight with that handle.
func (c *Client) find(handle uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.mu.calls[handle]
	if k == nil {
		return nil, errors.New("unknown handle")
	}
	return k, nil
}

// finish ends a call whose reply is complete.
func (c *Client) finish(k *call) {
	c.mu.Lock()
	delete(c.mu.calls, k.req.handle)
	c.mu.Unlock()
	close(k.done)
}

func (c *Client) simple(head []byte) error {
	be := binary.BigEndian
	e, handle := Errno(be.Uint32(head[4:])), be.Uint64(head[8:])
	k, err := c.find(handle)
	if err != nil {
		return err
	}
	_, _ = c.r.Discard(simpleSize) // peeked: it is there
	data := k.req.cmd == cmdRead || k.req.cmd == cmdBlockStatus
	switch {
	case c.structured && data:
		return errors.New("simple reply to a request with data")
	case e != 0:
		k.err = e
	case data:
		if _, err := io.ReadFull(c.r, k.p); err != nil {
			return fmt.Errorf("read data: %w", err)
		}
	}
	c.finish(k)
	return nil
}

func (c *Client) chunk() error {
	head, err := c.r.Peek(chunkSize)
	if err != nil {
		return err
	}
	be := binary.BigEndian
	flags, typ := be.Uint16(head[4:]), be.Uint16(head[6:])
	k, err := c.find(be.Uint64(head[8:]))
	if err != nil {
		return err
	}
	n := be.Uint32(head[16:])
	_, _ = c.r.Discard(chunkSize) // peeked: it is there
	if err := c.body(k, typ, n); err != nil {
		return err
	}
	if flags&chunkFlagDone == 0 {
		return nil
	}
	if k.err == nil {
		k.err = k.complete()
	}
	c.finish(k)
	return nil
}

// complete says what is missing in the reply of a call without errors.
func (k *call) complete() error {
	if k.req.cmd == cmdRead && k.got.bytes() != int64(len(k.p)) {
		return fmt.Errorf("server sent a part of the data only: %w", EIO)
	}
	if k.req.cmd == cmdBlockStatus && len(k.extents) == 0 {
		return fmt.Errorf("server sent no extents: %w", EIO)
	}
	return nil
}

func (c *Client) body(k *call, typ uint16, n uint32) error {
	switch {
	case typ == chunkNone && n == 0:
		return nil
	case typ == chunkOffsetData && n > 8 && k.req.cmd == cmdRead:
		return c.data(k, n-8)
	case typ == chunkOffsetHole && n == 12 && k.req.cmd == cmdRead:
		return c.hole(k)
	case typ == chunkBlockStatus && n >= 12 && n <= maxStatusChunk && n%8 == 4 && k.req.cmd == cmdBlockStatus:
		return c.status(k, n)
	case typ&(1<<15) != 0 && n >= 6 && n <= maxErrorChunk:
		return c.errorChunk(k, n)
	}
	return fmt.Errorf("chunk of type %d with %d bytes for command %d", typ, n, k.req.cmd)
}

// place returns the part of the caller's memory for [off, off+n).
func (k *call) place(off uint64, n uint32) ([]byte, error) {
	at := off - k.req.offset
	if off < k.req.offset || at > uint64(len(k.p)) || uint64(n) > uint64(len(k.p))-at {
		return nil, fmt.Errorf("data for [%d,+%d) was not asked for", off, n)
	}
	if n == 0 || !k.got.add(int64(at), int64(at)+int64(n)) {
		return nil, errors.New("data twice, or in too many pieces")
	}
	return k.p[at:][:n], nil
}

func (c *Client) data(k *call, n uint32) error {
	var b [8]byte
	if _, err := io.ReadFull(c.r, b[:]); err != nil {
		return err
	}
	p, err := k.place(binary.BigEndian.Uint64(b[:]), n)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(c.r, p)
	return err
}

func (c *Client) hole(k *call) error {
	var b [12]byte
	if _, err := io.ReadFull(c.r, b[:]); err != nil {
		return err
	}
	p, err := k.place(binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint32(b[8:]))
	clear(p)
	return err
}

func (c *Client) status(k *call, n uint32) error {
	b := make([]byte, n)
	if _, err := io.ReadFull(c.r, b); err != nil {
		return err
	}
	be := binary.BigEndian
	if be.Uint32(b) != c.contextID || k.extents != nil {
		return errors.New("status of an unknown context, or twice")
	}
	for b = b[4:]; len(b) > 0; b = b[8:] {
		e := statusExtent{be.Uint32(b), be.Uint32(b[4:])}
		if e.length == 0 {
			return errors.New("status of an empty extent")
		}
		k.extents = append(k.extents, e)
	}
	return nil
}

func (c *Client) errorChunk(k *call, n uint32) error {
	b := make([]byte, n)
	if _, err := io.ReadFull(c.r, b); err != nil {
		return err
	}
	be := binary.BigEndian
	e, text := Errno(be.Uint32(b)), b[6:]
	if l := int(be.Uint16(b[4:])); e == 0 || l > len(text) {
		return errors.New("malformed error chunk")
	} else if text = text[:l]; k.err == nil {
		k.err = e
		if l > 0 {
			k.err = fmt.Errorf("server says %q: %w", text, e)
		}
	}
	return nil
}

// covered is a set of disjoint ranges, sorted. Neighbours are joined.
type covered [][2]int64

func (s covered) bytes() (n int64) {
	for _, r := range s {
		n += r[1] - r[0]
	}
	return n
}

// add reports false if [start, end) overlaps the set or there are too many.
func (s *covered) add(start, end int64) bool {
	i, _ := slices.BinarySearchFunc(*s, start, func(r [2]int64, v int64) int {
		return int(min(1, max(-1, r[0]-v)))
	})
	set := *s
	if i < len(set) && set[i][0] < end || i > 0 && set[i-1][1] > start {
		return false
	}
	joinsLeft := i > 0 && set[i-1][1] == start
	joinsRight := i < len(set) && set[i][0] == end
	switch {
	case joinsLeft && joinsRight:
		set[i-1][1] = set[i][1]
		*s = slices.Delete(set, i, i+1)
	case joinsLeft:
		set[i-1][1] = end
	case joinsRight:
		set[i][0] = start
	case len(set) >= maxPieces:
		return false
	default:
		*s = slices.Insert(set, i, [2]int64{start, end})
	}
	return true
}
