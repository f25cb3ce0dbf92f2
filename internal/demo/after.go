package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/demo/guest"
	"farside/internal/demo/stage"
	"farside/internal/export"
)

// disaster overwrites the disk while the load goes on, and notes what was durable on the far side right before.
func (r *run) disaster(ctx context.Context) error {
	r.screen.title("Disaster")
	if err := r.ended(); err != nil {
		return err
	}
	m, err := r.stage.Far.State(ctx)
	if err != nil {
		return err
	}
	n := m.GetCounters()
	r.result.Writes, r.result.Bytes = n.GetWrites(), n.GetBytesCaptured()
	r.result.RPO = RPO{P50: float64(m.GetRpo().GetP50Ms()), P99: float64(m.GetRpo().GetP99Ms())}
	r.durable = m.GetHeadTimeNs()
	r.struck = time.Now()
	time.Sleep(clockSlack) // so that no write of the disaster carries a time at or before struck
	what, err := r.scene.disaster(ctx)
	if err != nil {
		return err
	}
	if err := r.scene.commits().refresh(); err != nil {
		return err
	}
	r.result.Committed = r.scene.commits().returnedBy(r.struck.UnixNano())
	r.screen.say("%s of garbage written over the whole disk at %s", inUnits(r.DiskSize), r.struck.UTC().Format(time.RFC3339Nano))
	r.screen.say("%s", what)
	r.screen.say("%d commits had returned before", r.result.Committed)
	return nil
}

// clockSlack is more than the clock of the capture may differ from that of the demo.
const clockSlack = 10 * time.Millisecond

// recover opens the last point before the disaster as a writable view, fetches it, and proves it.
func (r *run) recover(ctx context.Context) error {
	r.screen.title("Go back to the last write before it")
	f := &r.stage.Far
	start := time.Now()
	at := r.struck.Add(clockSlack / 2).UnixNano()
	r.awaitPoint(ctx, at)
	called := time.Now()
	var err error
	r.writable, err = f.Open(ctx, &farsidev1.Selector{Point: &farsidev1.Selector_TimeNs{TimeNs: at}}, true)
	if err != nil {
		return err
	}
	r.result.ViewOpen = milliseconds(time.Since(called))
	status := r.writable.View.GetStatus()
	p := status.GetPosition()
	r.screen.say("view of %d:%d, %s, open after %.1f ms at %s", p.GetTimeline(), p.GetSeq(),
		time.Unix(0, status.GetTimeNs()).UTC().Format(time.RFC3339Nano), r.result.ViewOpen, r.writable.URI)
	image, err := r.fetch(ctx)
	if err != nil {
		return err
	}
	if r.expected, err = r.scene.judge(ctx, image); err != nil {
		return err
	}
	if !r.expected.Opened.IsZero() {
		r.result.RTO = milliseconds(r.expected.Opened.Sub(start))
	}
	r.account(status.GetTimeNs())
	r.screen.say("file system: %s", r.result.Fsck)
	r.screen.say("database: %s, commits 1 to %d", r.result.Database, r.result.Recovered)
	return nil
}

// awaitPoint gives what was under way at the disaster some time to arrive; what doesn't is lost.
func (r *run) awaitPoint(ctx context.Context, at int64) {
	err := stage.Poll(ctx, 10*time.Second, "wait for the last writes", func(ctx context.Context) (bool, error) {
		m, err := r.stage.Far.State(ctx)
		return err == nil && m.GetHeadTimeNs() >= at, err
	})
	if err != nil {
		r.screen.say("the last writes before the disaster did not arrive: %v", err)
	}
}

// fetch copies the recovered disk into a sparse file: this machine may have no NBD client in its kernel.
func (r *run) fetch(ctx context.Context) (string, error) {
	image := filepath.Join(r.WorkDir, "recovered.img")
	file, err := os.Create(image)
	if err != nil {
		return "", fmt.Errorf("fetch the disk: %w", err)
	}
	start := time.Now()
	_, err = export.WriteRaw(ctx, file, r.writable.Disk, 0, nil)
	if err := errors.Join(err, file.Close()); err != nil {
		return "", fmt.Errorf("fetch the disk: %w", err)
	}
	r.screen.say("copied its data over NBD into a file in %.0f ms, to mount it here (a guest needs no copy)",
		milliseconds(time.Since(start)))
	return image, nil
}

// account counts what came back against the log of commits. pointTime is the time of the opened point.
func (r *run) account(pointTime int64) {
	res, j := &r.result, r.expected
	res.Recovered, res.Fsck = j.Rows, j.Fsck
	if res.Database = "ok"; !j.OK {
		res.Database = j.What
	}
	missing := max(0, res.Committed-res.Recovered)
	// Whatever had returned by the time of the opened point, or of the newest durable write, must be there.
	promised := min(r.scene.commits().returnedBy(max(pointTime, r.durable)), res.Committed)
	res.LostDurable = max(0, promised-res.Recovered)
	res.LostRPO = missing - res.LostDurable
}

// boot lets a guest read the recovered disk over NBD and compares what it found with what the judgement found.
func (r *run) boot(ctx context.Context) error {
	r.screen.title("Boot a machine from the replica")
	if r.guest == nil {
		r.screen.say("left out: %s", r.result.Boot.Skipped)
		return nil
	}
	b := &r.result.Boot
	select {
	case b.Accel = <-r.probe.answer:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	limited, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	report, err := r.guest.Boot(limited, guest.Task{Disk: r.writable.URI, Sum: r.expected.Read, Accel: b.Accel, Dir: r.WorkDir})
	if err != nil && ctx.Err() != nil {
		return err
	}
	b.Seconds = report.Took.Seconds()
	b.Marker = err == nil && report.Marker && len(r.expected.Sums) > 0
	for name, sum := range r.expected.Sums {
		if report.Sums[name] != sum {
			b.Marker = false
			r.screen.say("the guest read %s as %q, expected %q", name, report.Sums[name], sum)
		}
	}
	if !b.Marker {
		r.screen.say("THE GUEST DID NOT READ THE REPLICA: %v\n%s", err, report.Log)
		return nil
	}
	r.screen.say("a Linux guest (QEMU, %s) booted, read the replica over NBD, found the same sums, and powered off: %.1f s", b.Accel, b.Seconds)
	return nil
}
