package stage

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/nbd"
)

// Far is the far side as a user sees it: through the API of the configuration server.
type Far struct {
	Client  *api.Client
	Machine string // id of the protected machine
}

// Poll calls done until it says so; an error of done ends it. It gives up after limit, saying what it waited for.
func Poll(ctx context.Context, limit time.Duration, what string, done func(ctx context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%s: not within %v: %w", what, limit, dr.ErrUnavailable))
	defer cancel()
	for {
		ok, err := done(ctx)
		if ok && err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return errors.Join(context.Cause(ctx), err)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pollEvery):
		}
	}
}

// pollEvery is how often Poll asks the configuration server for news.
const pollEvery = 100 * time.Millisecond

// State returns what is known of the machine.
func (f *Far) State(ctx context.Context) (*farsidev1.Machine, error) {
	r, err := f.Client.GetMachine(ctx, &farsidev1.GetMachineRequest{Machine: f.Machine})
	if err != nil {
		return nil, fmt.Errorf("look at the machine: %w", err)
	}
	return r.GetMachine(), nil
}

// Offered waits until the agent offers the disk.
func (f *Far) Offered(ctx context.Context, path string) error {
	return Poll(ctx, 15*time.Second, "wait until the agent sees "+path, func(ctx context.Context) (bool, error) {
		m, err := f.State(ctx)
		if err != nil {
			return false, err
		}
		for _, d := range m.GetDiscovered() {
			if d.GetPath() == path && !d.GetProtectable() {
				return false, fmt.Errorf("%s can't be protected: %s: %w", path, d.GetReason(), dr.ErrUnsupported)
			}
			if d.GetPath() == path {
				return true, nil
			}
		}
		return false, nil
	})
}

// Protect asks for the replication of the disk.
func (f *Far) Protect(ctx context.Context, path, driver string) error {
	_, err := f.Client.ProtectMachine(ctx, &farsidev1.ProtectMachineRequest{
		Machine: f.Machine, DiskPaths: []string{path}, Settings: &farsidev1.AgentSettings{CaptureDriver: driver},
	})
	if err != nil {
		return fmt.Errorf("protect %s: %w", path, err)
	}
	return nil
}

// Tag marks the present and returns when the mark is durable on the far side.
func (f *Far) Tag(ctx context.Context, name string) (*farsidev1.TagPoint, error) {
	r, err := f.Client.TagPoint(ctx, &farsidev1.TagPointRequest{Machine: f.Machine, Name: name, TimeoutMs: 60_000})
	if err != nil {
		return nil, fmt.Errorf("tag: %w", err)
	}
	return r.GetTag(), nil
}

// Opened is an open view and a connection to its disk.
type Opened struct {
	View *farsidev1.View
	Disk *nbd.Client
	URI  string // of Disk
}

// Open opens a view and connects to its first disk.
func (f *Far) Open(ctx context.Context, at *farsidev1.Selector, writable bool) (*Opened, error) {
	r, err := f.Client.OpenView(ctx, &farsidev1.OpenViewRequest{Machine: f.Machine, Selector: at, Writable: writable, Wait: true, TimeoutMs: 30_000})
	if err != nil {
		return nil, fmt.Errorf("open the view: %w", err)
	}
	v := r.GetView()
	s := v.GetStatus()
	if s.GetState() != farsidev1.ViewState_VIEW_STATE_OPEN || len(s.GetExports()) == 0 {
		return nil, fmt.Errorf("open the view: it is %v: %s: %w", s.GetState(), s.GetError(), dr.ErrUnavailable)
	}
	o := &Opened{View: v}
	for _, uri := range s.GetExports()[0].GetUris() {
		if strings.HasPrefix(uri, "nbd+unix:") || strings.HasPrefix(uri, "nbd:") {
			o.URI = uri
			break
		}
	}
	if o.URI == "" {
		return nil, fmt.Errorf("open the view: none of %q can be used from here: %w", s.GetExports()[0].GetUris(), dr.ErrUnsupported)
	}
	if o.Disk, err = nbd.Dial(ctx, o.URI, nil); err != nil {
		return nil, fmt.Errorf("open the view: %w", err)
	}
	return o, nil
}

// Close ends the view and its connection.
func (f *Far) Close(ctx context.Context, o *Opened) error {
	err := o.Disk.Close()
	if _, e := f.Client.CloseView(ctx, &farsidev1.CloseViewRequest{View: o.View.GetId(), Wait: true, TimeoutMs: 10_000}); e != nil {
		err = errors.Join(err, fmt.Errorf("close the view: %w", e))
	}
	return err
}
