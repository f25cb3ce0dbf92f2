package nbd

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// ErrClientClosed is the answer to calls after Close.
var ErrClientClosed = errors.New("nbd: client closed")

// Client is a connection to one export. It is a Device, and Zeroer, Trimmer
// and Mapper as far as the server is. Calls may run in parallel; each is one
// request, or several when it is longer than the server takes. Replies are
// bounded by what was asked for, whatever the server sends.
type Client struct {
	conn       net.Conn
	r          *bufio.Reader
	size       int64
	flags      uint16
	structured bool
	allocation bool
	contextID  uint32
	minBlock   uint32
	maxBlock   uint32

	// write lets one request at a time out. broken: one went out in part, so
	// nothing may follow it, or it would be taken for the rest.
	write struct {
		sync.Mutex
		broken bool
	}
	done chan struct{} // closed when the reader is gone

	mu struct {
		sync.Mutex
		calls  map[uint64]*call
		handle uint64
		err    error // why no more calls are possible
	}
}

// call is a request in flight. The reader owns it until done is closed.
type call struct {
	req     request
	p       []byte  // where a read's data goes
	got     covered // which part of p is filled
	extents []statusExtent
	err     error // an error chunk; the rest of the reply still comes
	done    chan struct{}
}

func (c *Client) takeContext(typ uint32, data []byte) error {
	if typ != repMetaContext || len(data) < 4 {
		return errors.New("malformed context")
	}
	if string(data[4:]) == contextAllocation {
		c.allocation, c.contextID = true, binary.BigEndian.Uint32(data)
	}
	return nil
}

func (c *Client) takeInfo(data []byte) error {
	be := binary.BigEndian
	switch kind, b := be.Uint16(data), data[2:]; {
	case kind == infoExport && len(b) == 10:
		c.size, c.flags = int64(be.Uint64(b)), be.Uint16(b[8:])
		if c.size < 0 {
			return fmt.Errorf("impossible size %d", uint64(c.size))
		}
	case kind == infoBlockSize && len(b) == 12:
		lo, hi := be.Uint32(b), be.Uint32(b[8:])
		if lo == 0 || lo&(lo-1) != 0 || lo > 64<<10 || hi < lo {
			return fmt.Errorf("impossible block sizes %d to %d", lo, hi)
		}
		c.minBlock = lo
		c.maxBlock = min(hi, MaxRequest) &^ (lo - 1)
	case kind == infoExport || kind == infoBlockSize:
		return errors.New("malformed information")
	}
	return nil
}

func (c *Client) start() {
	c.mu.calls = map[uint64]*call{}
	c.done = make(chan struct{})
	go func() { // ends when the connection does; Close waits for it
		defer close(c.done)
		c.fail(c.replies())
	}()
}

// Size returns the size of the export in bytes.
func (c *Client) Size() int64 { return c.size }

// ReadOnly reports whether the server refuses changes.
func (c *Client) ReadOnly() bool { return c.flags&txReadOnly != 0 }

// MultiConn reports whether a Flush on one connection covers all of them.
func (c *Client) MultiConn() bool { return c.flags&txMultiConn != 0 }

// MinBlock is what offsets and lengths must be multiples of, in bytes.
func (c *Client) MinBlock() int { return int(c.minBlock) }

// Close says good-bye and waits until nothing of the client runs. Calls in
// flight fail.
func (c *Client) Close() error {
	c.abort(ErrClientClosed, func() {
		if c.write.TryLock() { // or else somebody's request hangs
			defer c.write.Unlock()
			if !c.write.broken {
				var b [requestSize]byte
				(&request{cmd: cmdDisc}).put(b[:])
				_ = c.conn.SetWriteDeadline(time.Now().Add(time.Second))
				_, _ = c.conn.Write(b[:]) // good manners only
			}
		}
	})
	<-c.done
	return nil
}

// abort lets no more calls begin and ends the connection; that ends the
// reader, which ends the calls. Only it may: until then it owns their memory.
func (c *Client) abort(err error, last func()) {
	c.mu.Lock()
	first := c.mu.err == nil
	if first {
		c.mu.err = err
	}
	c.mu.Unlock()
	if first && last != nil {
		last()
	}
	c.conn.Close()
}

// fail ends all calls. The reader calls it last.
func (c *Client) fail(err error) {
	c.abort(err, nil)
	c.mu.Lock()
	defer c.mu.Unlock()
	for h, k := range c.mu.calls {
		k.err = c.mu.err
		delete(c.mu.calls, h)
		close(k.done)
	}
}

// do sends a request and waits for its reply.
func (c *Client) do(q request, out, in []byte) (*call, error) {
	k := &call{req: q, p: in, done: make(chan struct{})}
	c.mu.Lock()
	if c.mu.err != nil {
		defer c.mu.Unlock()
		return nil, c.mu.err
	}
	c.mu.handle++
	k.req.handle = c.mu.handle
	c.mu.calls[k.req.handle] = k
	c.mu.Unlock()
	if err := c.send(&k.req, out); err != nil {
		c.abort(fmt.Errorf("send request: %w", err), nil)
	}
	<-k.done
	return k, k.err
}

func (c *Client) send(q *request, payload []byte) (err error) {
	head := make([]byte, requestSize)
	q.put(head)
	c.write.Lock()
	defer c.write.Unlock()
	if c.write.broken {
		return net.ErrClosed
	}
	if len(payload) == 0 {
		_, err = c.conn.Write(head)
	} else {
		v := net.Buffers{head, payload}
		_, err = v.WriteTo(c.conn)
	}
	c.write.broken = err != nil
	return err
}

// inPieces cuts [off, off+n) into requests that the server takes.
func (c *Client) inPieces(off, n, limit int64, f func(q request, from, to int64) error) error {
	if off < 0 || n < 0 || off > c.size || n > c.size-off {
		return fmt.Errorf("range [%d,%d) of %d bytes: %w", off, off+n, c.size, EINVAL)
	}
	for from := int64(0); from < n; {
		to := min(from+limit, n)
		if err := f(request{offset: uint64(off + from), length: uint32(to - from)}, from, to); err != nil {
			return err
		}
		from = to
	}
	return nil
}

// ReadAt reads len(p) bytes at off. Behind the end it returns io.EOF.
func (c *Client) ReadAt(p []byte, off int64) (n int, err error) {
	eof := off >= 0 && int64(len(p)) > c.size-off
	if eof {
		p = p[:max(0, c.size-off)]
	}
	if eof && len(p) == 0 {
		return 0, io.EOF
	}
	err = c.inPieces(off, int64(len(p)), int64(c.maxBlock), func(q request, from, to int64) error {
		q.cmd = cmdRead
		_, err := c.do(q, nil, p[from:to])
		if err == nil {
			n = int(to)
		}
		return err
	})
	if err != nil {
		return n, fmt.Errorf("read nbd at %d: %w", off, err)
	}
	if eof {
		err = io.EOF
	}
	return n, err
}

// WriteAt writes p at off. It is durable only after a Flush.
func (c *Client) WriteAt(p []byte, off int64) (n int, err error) { return c.writeAt(p, off, 0) }

// WriteFUA writes p at off and returns when it is durable.
func (c *Client) WriteFUA(p []byte, off int64) (n int, err error) {
	if c.flags&txSendFUA == 0 {
		if n, err = c.writeAt(p, off, 0); err == nil {
			err = c.Flush()
		}
		return n, err
	}
	return c.writeAt(p, off, cmdFlagFUA)
}

func (c *Client) writeAt(p []byte, off int64, flags uint16) (n int, err error) {
	err = c.inPieces(off, int64(len(p)), int64(c.maxBlock), func(q request, from, to int64) error {
		q.cmd, q.flags = cmdWrite, flags
		_, err := c.do(q, p[from:to], nil)
		if err == nil {
			n = int(to)
		}
		return err
	})
	if err != nil {
		err = fmt.Errorf("write nbd at %d: %w", off, err)
	}
	return n, err
}

// Flush returns when all writes that returned before it are durable.
func (c *Client) Flush() error {
	if c.flags&txSendFlush == 0 {
		return nil // then the server writes through, says the protocol
	}
	if _, err := c.do(request{cmd: cmdFlush}, nil, nil); err != nil {
		return fmt.Errorf("flush nbd: %w", err)
	}
	return nil
}

// Trim lets the server forget [off, off+n). Without the ability it does nothing.
func (c *Client) Trim(off, n int64) error {
	if c.flags&txSendTrim == 0 {
		return nil
	}
	return c.ranged("trim", cmdTrim, 0, off, n)
}

// Zero makes [off, off+n) read as zeroes; it may become a hole. Without the
// ability the error is errors.ErrUnsupported.
func (c *Client) Zero(off, n int64) error { return c.zero(0, off, n) }

// ZeroNoHole is Zero for a range that stays allocated.
func (c *Client) ZeroNoHole(off, n int64) error { return c.zero(cmdFlagNoHole, off, n) }

func (c *Client) zero(flags uint16, off, n int64) error {
	if c.flags&txSendWriteZeroes == 0 {
		return errors.ErrUnsupported
	}
	return c.ranged("zero", cmdWriteZeroes, flags, off, n)
}

// Prefetch announces that [off, off+n) will be read.
func (c *Client) Prefetch(off, n int64) error {
	if c.flags&txSendCache == 0 {
		return nil
	}
	return c.ranged("prefetch", cmdCache, 0, off, n)
}

// maxRange is the longest request without payload: not the longest possible,
// so that one request doesn't take for ever.
const maxRange = 1 << 30

func (c *Client) ranged(verb string, cmd, flags uint16, off, n int64) error {
	err := c.inPieces(off, n, maxRange, func(q request, _, _ int64) error {
		q.cmd, q.flags = cmd, flags
		_, err := c.do(q, nil, nil)
		return err
	})
	if err != nil {
		return fmt.Errorf("%s nbd at %d: %w", verb, off, err)
	}
	return nil
}

// Map calls fn for the extents of [off, off+n), as Mapper says. A server that
// doesn't know gives one extent of data.
func (c *Client) Map(off, n int64, fn func(off, n int64, zero, hole bool) error) error {
	if !c.allocation && n > 0 {
		return fn(off, n, false, false)
	}
	for end := off + n; off < end; {
		var k *call
		err := c.inPieces(off, min(end-off, maxRange), maxRange, func(q request, _, _ int64) (err error) {
			q.cmd = cmdBlockStatus
			k, err = c.do(q, nil, nil)
			return err
		})
		if err != nil {
			return fmt.Errorf("map nbd at %d: %w", off, err)
		}
		for _, e := range k.extents {
			l := min(int64(e.length), end-off)
			if l == 0 {
				break
			}
			if err := fn(off, l, e.state&stateZero != 0, e.state&stateHole != 0); err != nil {
				return err
			}
			off += l
		}
	}
	return nil
}
