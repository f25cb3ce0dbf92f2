// Package wan is a bad network for tests: a proxy between two ends that limits
// the rate, delays, cuts, resets and half-opens connections while they are used.
//
// Listen puts a Proxy on loopback TCP in front of an address; New takes a
// function that connects, so that both ends may also be in memory and time that of
// a testing/synctest bubble: then every byte passes at a moment that can be told
// beforehand. Set changes the line at any time, also under a transfer.
//
// It doesn't lose or reorder single packets: over TCP nobody could tell. It is
// safe for concurrent use; Close waits for its goroutines.
package wan

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Line is how a network is. The zero value is a perfect one.
type Line struct {
	Rate  int64         // bytes per second in each direction, of all connections together; 0 means no limit
	Delay time.Duration // each way
	Cut   bool          // nothing passes and no new connection comes about; what is open stays so
}

const (
	chunk   = 32 << 10              // bytes that pass at once, at most
	slice   = 10 * time.Millisecond // of a limited line that a chunk takes, at most
	sockBuf = 64 << 10              // of each socket: what the kernel holds counts as in flight
	queued  = 64                    // chunks on the way, at most
)

// Proxy is a network between those who connect to it and what it connects to.
type Proxy struct {
	dial     func(context.Context) (net.Conn, error)
	listener net.Listener // nil of New
	ctx      context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	up, down direction

	mu struct {
		sync.Mutex
		line    Line
		changed chan struct{} // closed by Set
		pairs   map[*pair]struct{}
		closed  bool
	}
}

// direction is one way through the line, which all connections share.
type direction struct {
	bytes atomic.Int64
	mu    struct {
		sync.Mutex
		free time.Time // when what was let through last has passed
	}
}

// pair is a connection and its continuation.
type pair struct {
	near, far net.Conn
	ctx       context.Context
	cancel    context.CancelFunc
	half      atomic.Bool // near is to be left alone
}

// New returns a perfect line to what dial connects to; Serve gives it connections.
func New(dial func(context.Context) (net.Conn, error)) *Proxy {
	p := &Proxy{dial: dial}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.mu.changed = make(chan struct{})
	p.mu.pairs = map[*pair]struct{}{}
	return p
}

// Listen returns a perfect line to a TCP address; Addr says where it begins.
func Listen(target string) (*Proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	p := New(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", target)
	})
	p.listener = l
	p.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.Serve(c)
		}
	})
	return p, nil
}

// Addr is where a proxy of Listen can be reached, as host:port.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Set makes the line another one, at once and for all connections.
func (p *Proxy) Set(l Line) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.line = l
	close(p.mu.changed)
	p.mu.changed = make(chan struct{})
	for _, d := range []*direction{&p.up, &p.down} {
		d.mu.Lock()
		d.mu.free = time.Time{}
		d.mu.Unlock()
	}
}

// Bytes returns how many bytes have passed, from those who connect (up) and to them.
func (p *Proxy) Bytes() (up, down int64) { return p.up.bytes.Load(), p.down.bytes.Load() }

// Connections returns how many connections are open.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.mu.pairs)
}

// Reset breaks all connections: both sides see an error at once. New ones may come about.
func (p *Proxy) Reset() { p.each(func(x *pair) { x.cancel() }) }

// HalfOpen breaks all connections, but only the far side sees it: the near side may
// write until its buffers are full and waits for ever, as for a peer that lost its power.
func (p *Proxy) HalfOpen() {
	p.each(func(x *pair) {
		x.half.Store(true)
		x.cancel()
	})
}

func (p *Proxy) each(do func(*pair)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for x := range p.mu.pairs {
		do(x)
	}
}

// Close breaks everything, half-open connections too, and waits until it has.
func (p *Proxy) Close() error {
	p.mu.Lock()
	p.mu.closed = true
	p.mu.Unlock()
	var err error
	if p.listener != nil {
		err = p.listener.Close()
	}
	p.cancel()
	p.wg.Wait()
	return err
}

// Serve carries a connection, which it owns, until it ends. It returns at once.
func (p *Proxy) Serve(near net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.closed {
		near.Close()
		return
	}
	x := &pair{near: near}
	x.ctx, x.cancel = context.WithCancel(p.ctx)
	p.mu.pairs[x] = struct{}{}
	p.wg.Go(func() { p.carry(x) })
}

func (p *Proxy) carry(x *pair) {
	defer func() {
		p.mu.Lock()
		delete(p.mu.pairs, x)
		p.mu.Unlock()
		x.cancel()
		if x.half.Load() {
			<-p.ctx.Done()
		}
		abort(x.near)
	}()
	if p.pass(x.ctx, &p.up, 0) != nil { // a cut line makes connecting wait
		return
	}
	far, err := p.dial(x.ctx)
	if err != nil {
		return
	}
	x.far = far
	shrink(x.near)
	shrink(far)
	stop := context.AfterFunc(x.ctx, func() {
		abort(far)
		if x.half.Load() {
			_ = x.near.SetDeadline(time.Unix(1, 0)) // only ends our own reading and writing
			return
		}
		abort(x.near)
	})
	defer stop()
	var both sync.WaitGroup
	both.Go(func() { p.copy(x, &p.up, x.near, far) })
	both.Go(func() { p.copy(x, &p.down, far, x.near) })
	both.Wait()
}

// shrink lets the kernel hold little, so that the rate is felt by the sender.
func shrink(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetReadBuffer(sockBuf) // a larger one only blurs
		_ = t.SetWriteBuffer(sockBuf)
	}
}

// abort closes c with a reset where it can.
func abort(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // else it closes in good order: also an end
	}
	c.Close()
}

// parcel is bytes on the way.
type parcel struct {
	data []byte
	sent time.Time
}

// copy carries bytes one way, in order. The end of the stream is passed on behind
// them; an error ends both ways.
func (p *Proxy) copy(x *pair, d *direction, from io.Reader, to net.Conn) {
	way := make(chan parcel, queued)
	var wg sync.WaitGroup
	wg.Go(func() {
		for c := range way {
			if p.deliver(x.ctx, c, to) != nil {
				x.cancel()
			}
		}
	})
	err := p.read(x.ctx, d, from, way)
	close(way)
	wg.Wait()
	if half, ok := to.(interface{ CloseWrite() error }); ok && errors.Is(err, io.EOF) && half.CloseWrite() == nil {
		return
	}
	x.cancel()
}

// read puts what arrives on the way, as fast as the line is.
func (p *Proxy) read(ctx context.Context, d *direction, from io.Reader, way chan<- parcel) error {
	for {
		b := make([]byte, p.size())
		n, err := from.Read(b)
		if n > 0 {
			if err := p.pass(ctx, d, n); err != nil {
				return err
			}
			d.bytes.Add(int64(n))
			select {
			case way <- parcel{b[:n], time.Now()}:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err != nil {
			return err
		}
	}
}

// size is how much may pass at once: little on a slow line, so that it flows.
func (p *Proxy) size() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.line.Rate == 0 {
		return chunk
	}
	return int(min(chunk, max(1, p.mu.line.Rate*int64(slice)/int64(time.Second))))
}

// state returns the line and what tells that it changes.
func (p *Proxy) state() (Line, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.line, p.mu.changed
}

// pass waits until n bytes have entered the line.
func (p *Proxy) pass(ctx context.Context, d *direction, n int) error {
	for {
		line, changed := p.state()
		wait := time.Duration(-1) // for ever
		if !line.Cut {
			if wait = d.enter(line, n, time.Now()); wait == 0 {
				return ctx.Err()
			}
		}
		if err := sleep(ctx, wait, changed); err != nil {
			return err
		}
	}
}

// enter takes n bytes in if the line is free, or says how long it is not.
func (d *direction) enter(l Line, n int, now time.Time) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	if wait := d.mu.free.Sub(now); wait > 0 {
		return wait
	}
	if l.Rate > 0 {
		// From the moment it was free, lest the sleeps' lateness makes the line slower than it is.
		if now.Sub(d.mu.free) > slice {
			d.mu.free = now
		}
		d.mu.free = d.mu.free.Add(time.Duration(int64(n) * int64(time.Second) / l.Rate))
	}
	return 0
}

// deliver hands a parcel over once it has been on the way long enough.
func (p *Proxy) deliver(ctx context.Context, c parcel, to io.Writer) error {
	for {
		line, changed := p.state()
		wait := time.Until(c.sent.Add(line.Delay))
		if line.Cut {
			wait = -1
		} else if wait <= 0 {
			_, err := to.Write(c.data)
			return err
		}
		if err := sleep(ctx, wait, changed); err != nil {
			return err
		}
	}
}

// sleep waits for a time, or for a change if it is negative; a change ends it.
func sleep(ctx context.Context, d time.Duration, changed <-chan struct{}) error {
	var after <-chan time.Time
	if d >= 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		after = t.C
	}
	select {
	case <-after:
	case <-changed:
	case <-ctx.Done():
	}
	return ctx.Err()
}
