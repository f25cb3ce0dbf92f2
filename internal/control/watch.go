package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/api/farside/v1/farsidev1connect"
	"farside/internal/dr"
	"farside/internal/transport"
)

// backoff says how long to wait after failures in a row.
type backoff struct{ failures int }

const (
	firstWait = 250 * time.Millisecond
	longWait  = 15 * time.Second
)

// next returns the wait after one more failure: twice the one before up to
// longWait, less up to a half by chance, so that nodes do not come back all at once.
func (b *backoff) next() time.Duration {
	d := min(firstWait<<min(b.failures, 10), longWait)
	b.failures++
	return d - rand.N(d/2)
}

func (b *backoff) reset() { b.failures = 0 }

// Watch calls fn with the node's assignment: at once with the one that is kept on
// disk, if it has work, then whenever it changes. It may be called with the same one again; an
// assignment is the whole desired state, and must not be changed. fn must return soon: no
// other assignment comes before that, nor is the certificate renewed. Watch returns nil when
// ctx ends, and never before.
func (c *Client) Watch(ctx context.Context, fn func(*farsidev1.Assignment)) error {
	if a := c.Assignment(); a.GetWork() != nil {
		fn(a)
		c.setApplied(a.GetRevision())
	}
	var b backoff
	revision := uint64(0) // what fn has is from disk: ask for the current one at once
	for ctx.Err() == nil {
		if err := c.renewIfDue(ctx); err != nil {
			c.log.Warn("can't renew the certificate", "expires", c.id.Expires(), "error", err)
		}
		a, err := c.watchOnce(ctx, revision)
		switch {
		case err != nil:
			c.failed(ctx, "watch", err, &b)
		case a == nil:
			b.reset()
		default:
			b.reset()
			revision = a.GetRevision()
			c.accept(a)
			fn(c.Assignment())
			c.setApplied(revision)
		}
	}
	return nil
}

func (c *Client) watchOnce(ctx context.Context, revision uint64) (a *farsidev1.Assignment, err error) {
	err = c.call(ctx, pollTime+callTimeout, func(ctx context.Context, node farsidev1connect.NodeServiceClient) error {
		r, err := node.Watch(ctx, &farsidev1.WatchRequest{Revision: revision, WaitMs: pollTime.Milliseconds()})
		a = r.GetAssignment()
		return err
	})
	if err == nil && a != nil && a.GetNodeId() != c.id.Peer().Node.String() {
		return nil, fmt.Errorf("got the assignment of node %q: %w", a.GetNodeId(), dr.ErrInvalid)
	}
	return a, err
}

// failed waits after a failure, and logs the first of several in a row.
func (c *Client) failed(ctx context.Context, what string, err error, b *backoff) {
	if ctx.Err() != nil {
		return
	}
	if b.failures == 0 || errors.Is(err, dr.ErrDenied) {
		c.log.Warn("configuration server does not serve this node", "call", what, "error", err)
	}
	sleep(ctx, b.next())
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// renewIfDue renews the certificate after two thirds of its life, or when the
// assignment asks for it.
func (c *Client) renewIfDue(ctx context.Context) error {
	due := !c.now().Before(c.id.RenewAt())
	if t := c.Assignment().GetRenewIssuedBeforeNs(); t != 0 && c.id.Issued().UnixNano() < t {
		due = true
	}
	if !due {
		return nil
	}
	return c.Renew(ctx)
}

// Renew exchanges the node's certificate for a new one with a new key. Watch does
// so in time.
func (c *Client) Renew(ctx context.Context) error {
	key, csr, err := transport.NewRequest(c.id.Names()...)
	if err != nil {
		return fmt.Errorf("renew certificate: %w", err)
	}
	var r *farsidev1.RenewResponse
	err = c.call(ctx, callTimeout, func(ctx context.Context, node farsidev1connect.NodeServiceClient) (err error) {
		r, err = node.Renew(ctx, &farsidev1.RenewRequest{Csr: csr})
		return err
	})
	if err != nil {
		return fmt.Errorf("renew certificate: %w", err)
	}
	if err := c.id.Replace(key, r.GetCertificateChain(), r.GetAuthorities()); err != nil {
		return fmt.Errorf("renew certificate: %w", err)
	}
	c.connect()
	// If it can't be kept, a restart uses the old one, which is still good for a while.
	if err := c.saveIdentity(); err != nil {
		return fmt.Errorf("keep renewed certificate: %w", err)
	}
	c.log.Info("renewed the certificate", "expires", c.id.Expires())
	return nil
}

// trust takes over authorities that the configuration server names.
func (c *Client) trust(authorities [][]byte) {
	if slices.EqualFunc(authorities, c.id.Authorities(), bytes.Equal) {
		return
	}
	err := c.id.Trust(authorities)
	if err == nil {
		c.connect()
		err = c.saveIdentity()
	}
	if err != nil {
		c.log.Error("can't take over new authorities", "error", err)
	}
}

func (c *Client) saveIdentity() error {
	return c.disk.keep(transport.IdentityFile, func() error { return c.id.Save(c.dir) })
}
