// Package demo is `farside demo`: all of Farside on one machine, from a disk under load to its loss and back.
//
// Run starts the four roles as processes, makes a disk with a database under load, protects it, lets the disk
// be overwritten, brings it back as it was before that, proves what came back and boots a guest from it. Options
// say how large and how long; Result is what was measured. There are two scenes: a database on ext4 captured by
// eBPF, as root on Linux; and a disk of records behind a tap elsewhere.
//
// It uses the API, the command line and NBD like any user; it knows nothing of how the roles work, and what it
// measures is no benchmark. Load and Watchdog run in processes of their own.
//
// Run is called once in a process. Its processes die with it; see Isolate for mounts.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"farside/internal/demo/guest"
	"farside/internal/demo/stage"
	"farside/internal/dr"
)

// Options say how the demo is run.
type Options struct {
	DiskSize int64         // bytes of the protected disk
	Duration time.Duration // of the load between the end of the initial replication and the disaster
	Rate     int           // commits a second; 0: as many as go
	Capture  string        // "auto", "ebpf" or "tap"
	NoBoot   bool          // boot no guest
	WorkDir  string        // for everything that the demo writes; made if needed
	Kernels  []string      // roots below which a kernel for the guest is looked for
	Out      io.Writer     // where the demo is shown
	// Hold is called with the URI of the recovered disk before everything is taken down, or is nil.
	Hold func(ctx context.Context, uri string)
}

// minDisk is the smallest disk that the demo accepts, in bytes.
const minDisk = 64 << 20

// Check says what is wrong with the options; the error wraps dr.ErrInvalid.
func (o *Options) Check() error {
	switch {
	case o.DiskSize < minDisk || o.DiskSize%(1<<20) != 0:
		return fmt.Errorf("disk size %d: want whole MiB, at least %d: %w", o.DiskSize, minDisk, dr.ErrInvalid)
	case o.Duration <= 0:
		return fmt.Errorf("duration %v: want more than nothing: %w", o.Duration, dr.ErrInvalid)
	case o.Rate < 0:
		return fmt.Errorf("rate %d: want at least 0: %w", o.Rate, dr.ErrInvalid)
	case o.Capture != "auto" && o.Capture != "ebpf" && o.Capture != "tap":
		return fmt.Errorf("capture %q: want auto, ebpf or tap: %w", o.Capture, dr.ErrInvalid)
	}
	// The load also runs during the initial replication and the comparison.
	if written := int64((o.Duration + 15*time.Second).Seconds()) * int64(o.Rate) * max(meanContent, recordSize); written > o.DiskSize/2 {
		return fmt.Errorf("%d commits a second for %v may write %s, more than half of the disk of %s: %w",
			o.Rate, o.Duration, inUnits(written), inUnits(o.DiskSize), dr.ErrInvalid)
	}
	return nil
}

// run is one run of the demo.
type run struct {
	Options
	screen *screen
	driver string
	guest  *guest.Machine
	probe  *probe
	scene  scene
	stage  *stage.Stage
	result Result

	struck   time.Time     // the last moment before the disaster
	durable  int64         // what was durable on the far side then: UTC ns
	writable *stage.Opened // the recovered disk
	expected judgement
}

// Run runs the demo. The result is valid as far as the demo came, also with an error.
func Run(ctx context.Context, o Options) (result Result, err error) {
	if err := o.Check(); err != nil {
		return Result{}, err
	}
	if err := os.MkdirAll(o.WorkDir, 0o700); err != nil {
		return Result{}, fmt.Errorf("make the work directory: %w", err)
	}
	r := &run{Options: o, screen: newScreen(o.Out)}
	defer func() {
		result, err = r.result, errors.Join(err, r.close())
	}()
	for _, step := range []func(context.Context) error{
		r.prepare, r.raise, r.protect, r.watchLoad, r.compare, r.disaster, r.recover, r.boot,
	} {
		if err := step(ctx); err != nil {
			return r.result, err
		}
		if r.stage != nil {
			if err := r.stage.Ended(); err != nil {
				return r.result, err
			}
		}
	}
	r.summary()
	if o.Hold != nil && r.result.Bad() == nil {
		o.Hold(ctx, r.writable.URI)
	}
	return r.result, nil
}

// close takes everything down, the last first. It doesn't need ctx: it must also work after an interrupt.
func (r *run) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var err error
	if r.probe != nil {
		r.probe.end()
	}
	if r.writable != nil {
		err = errors.Join(err, r.stage.Far.Close(ctx, r.writable))
	}
	if r.scene != nil {
		err = errors.Join(err, r.scene.close())
	}
	if r.stage != nil {
		err = errors.Join(err, r.stage.Strike())
	}
	return err
}

func (r *run) summary() {
	s, res := r.screen, r.result
	s.title("Result")
	s.say("RPO  %.0f ms half the time, %.0f ms in 99 of 100; %d of %d commits lost to it", res.RPO.P50, res.RPO.P99, res.LostRPO, res.Committed)
	s.say("RTO  %.0f ms from the decision to the open database (the view itself: %.1f ms)", res.RTO, res.ViewOpen)
	s.say("%d of %d commits recovered; %d missing that were durable on the far side", min(res.Recovered, res.Committed), res.Committed, res.LostDurable)
	if err := res.Bad(); err != nil {
		s.say("THIS IS NOT AS IT MUST BE: %v", err)
	}
}
