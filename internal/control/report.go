package control

import (
	"context"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/api/farside/v1/farsidev1connect"
)

// leastGap is the least time between two reports, however often they are asked for.
const leastGap = 20 * time.Millisecond

// Report sends what fn returns: at once, then every so often, and soon after each
// ReportSoon. The assignment may set another pace. Host, version, times and the assignment's
// revision are filled in. fn may return nil to send nothing. Report returns nil when ctx
// ends, and never before.
func (c *Client) Report(ctx context.Context, fn func() *farsidev1.Report, every time.Duration) error {
	host := Host()
	var b backoff
	for ctx.Err() == nil {
		revision := c.applied() // before fn looks: what fn returns is at least as new
		if r := fn(); r != nil {
			if r.AssignmentRevision == 0 {
				r.AssignmentRevision = revision
			}
			if err := c.reportOnce(ctx, r, host); err != nil {
				c.failed(ctx, "report", err, &b)
				continue
			}
			b.reset()
		}
		c.waitForReport(ctx, every)
	}
	return nil
}

// ReportSoon has Report send a report now: something changed that people wait for.
func (c *Client) ReportSoon() {
	select {
	case c.poke <- struct{}{}:
	default: // asked for already
	}
}

func (c *Client) waitForReport(ctx context.Context, every time.Duration) {
	if ms := c.Assignment().GetReportEveryMs(); ms > 0 {
		every = time.Duration(ms) * time.Millisecond
	}
	sleep(ctx, leastGap)
	t := time.NewTimer(max(every-leastGap, 0))
	defer t.Stop()
	select {
	case <-t.C:
	case <-c.poke:
	case <-ctx.Done():
	}
}

func (c *Client) reportOnce(ctx context.Context, r *farsidev1.Report, host *farsidev1.HostInfo) error {
	if r.Host == nil {
		r.Host = host
	}
	if r.Version == "" {
		r.Version = c.version
	}
	if r.StartedNs == 0 {
		r.StartedNs = c.started.UnixNano()
	}
	r.ClockNs = c.now().UnixNano()
	return c.call(ctx, callTimeout, func(ctx context.Context, node farsidev1connect.NodeServiceClient) error {
		answer, err := node.Report(ctx, &farsidev1.ReportRequest{Report: r})
		if err == nil {
			c.serverSaid(answer.GetServerTimeNs())
		}
		return err
	})
}

// serverSaid takes down what the server's clock said just now.
func (c *Client) serverSaid(ns int64) {
	if ns <= 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.serverTime, c.mu.heardAt = time.Unix(0, ns), c.now()
}

// ServerTime returns what the server's clock says now, by its last answer to a report and
// the time since: setting this machine's clock does not change it. Before the first answer it is this
// machine's clock. Deadlines that the server sets are to be held against it.
func (c *Client) ServerTime() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if c.mu.serverTime.IsZero() {
		return now
	}
	return c.mu.serverTime.Add(now.Sub(c.mu.heardAt)) // monotonic
}
