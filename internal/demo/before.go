package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/demo/guest"
	"farside/internal/demo/stage"
)

// prepare chooses the scene and makes its disk.
func (r *run) prepare(ctx context.Context) error {
	s := r.screen
	s.title("A disk")
	s.say("work directory %s", r.WorkDir)
	r.driver = r.Capture
	why := cannotCapture()
	if r.driver == "auto" {
		if r.driver = "ebpf"; why != "" {
			r.driver = "tap"
			s.say("not capturing the kernel's writes with eBPF (%s): a tap in front of the disk does it", why)
		}
	}
	r.result.Capture = r.driver
	var err error
	if r.driver == "ebpf" {
		if r.scene, err = newDatabase(ctx, r.WorkDir, r.DiskSize, r.Rate); err != nil {
			return err
		}
		s.say("%s, %s, ext4, with a SQLite database under load: each commit is fsynced, and logged elsewhere", r.scene.path(), inUnits(r.DiskSize))
	} else {
		if r.scene, err = newRecords(r.WorkDir, r.DiskSize, r.Rate, stage.TapURI(r.WorkDir)); err != nil {
			return err
		}
		s.say("%s, %s, for a database of numbered records: each is made durable, and logged elsewhere", r.scene.path(), inUnits(r.DiskSize))
	}
	r.findGuest(ctx)
	if r.scene.live() {
		return r.scene.begin(ctx)
	}
	return nil
}

// findGuest looks for the parts of a guest, and meanwhile tries which accelerator really works.
func (r *run) findGuest(ctx context.Context) {
	if r.NoBoot {
		r.result.Boot.Skipped = "not wanted"
		return
	}
	m, err := guest.Find(r.Kernels...)
	if err != nil {
		r.result.Boot.Skipped = err.Error()
		return
	}
	r.guest = m
	r.probe = startProbe(ctx, m, filepath.Join(r.WorkDir, "probe"))
}

// probe finds out in the background which accelerator really works.
type probe struct {
	end    func() // stops it and waits
	answer chan string
}

func startProbe(ctx context.Context, m *guest.Machine, dir string) *probe {
	ctx, cancel := context.WithCancel(ctx)
	p := &probe{answer: make(chan string, 1)}
	var running sync.WaitGroup
	p.end = func() { cancel(); running.Wait() }
	running.Go(func() {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			p.answer <- "tcg" // booting will say what is wrong with the directory
			return
		}
		p.answer <- m.Accel(ctx, dir)
	})
	return p
}

// raise starts the roles.
func (r *run) raise(ctx context.Context) error {
	r.screen.title("Four roles")
	start := time.Now()
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	s, err := stage.Raise(ctx, stage.Options{Dir: r.WorkDir, Program: self, Driver: r.driver, Disk: r.scene.path()})
	if err != nil {
		return err
	}
	r.stage = s
	for _, p := range s.Processes {
		r.screen.say("%-14s process %d", p.Name, p.PID())
	}
	r.screen.say("joined with one-time tokens, mutual TLS 1.3 between all, in %.1f s", time.Since(start).Seconds())
	return nil
}

// protect starts the replication and waits for the end of the initial one.
func (r *run) protect(ctx context.Context) error {
	r.screen.title("Protect the disk")
	f := &r.stage.Far
	if err := f.Offered(ctx, r.scene.path()); err != nil {
		return err
	}
	start := time.Now()
	if err := f.Protect(ctx, r.scene.path(), r.driver); err != nil {
		return err
	}
	if !r.scene.live() {
		var last error
		err := stage.Poll(ctx, 20*time.Second, "connect to the tap", func(ctx context.Context) (bool, error) {
			last = r.scene.begin(ctx)
			return last == nil, r.stage.Ended()
		})
		if err != nil {
			return errors.Join(err, last)
		}
	}
	bar := r.screen.newBar()
	complete := false
	err := stage.Poll(ctx, 60*time.Second, "wait for the initial replication", func(ctx context.Context) (bool, error) {
		m, err := f.State(ctx)
		if err != nil {
			return false, err
		}
		if m.GetProgress().GetBytesTotal() > 0 {
			bar.set(m.GetProgress().GetBytesDone(), m.GetProgress().GetBytesTotal())
		}
		if m.GetState() == farsidev1.MachineState_MACHINE_STATE_FAILED {
			return false, fmt.Errorf("the machine failed: %s", m.GetReason())
		}
		complete = m.GetState() == farsidev1.MachineState_MACHINE_STATE_PROTECTED && m.GetNewest() != nil
		return complete, r.ended()
	})
	bar.end(complete)
	if err != nil {
		return err
	}
	r.result.InitialReplication = time.Since(start).Seconds()
	r.screen.say("initial replication took %.1f s while the load went on; from now on each write is a point", r.result.InitialReplication)
	return nil
}

// ended says which process, the load included, has ended that should run.
func (r *run) ended() error {
	if err := r.stage.Ended(); err != nil {
		return err
	}
	return r.scene.running()
}

// watchLoad lets the load run and shows what goes over.
func (r *run) watchLoad(ctx context.Context) error {
	r.screen.title("Replicate")
	last, lastBytes := time.Now(), int64(-1)
	end := last.Add(r.Duration)
	for time.Now().Before(end) {
		if err := r.ended(); err != nil {
			return err
		}
		m, err := r.stage.Far.State(ctx)
		if err != nil {
			return err
		}
		if err := r.scene.commits().refresh(); err != nil {
			return err
		}
		n, now := m.GetCounters(), time.Now()
		if lastBytes >= 0 {
			rate := float64(n.GetBytesCaptured()-lastBytes) / now.Sub(last).Seconds() / 1e6
			r.screen.line("%d commits   %d writes   %.1f MB/s   RPO %d ms (99%%: %d ms)   backlog %s", r.scene.commits().count(),
				n.GetWrites(), rate, m.GetRpo().GetNowMs(), m.GetRpo().GetP99Ms(), inUnits(m.GetStream().GetBacklogBytes()))
		}
		last, lastBytes = now, n.GetBytesCaptured()
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(min(500*time.Millisecond, max(0, time.Until(end)))):
		}
	}
	return nil
}

// compare freezes the disk for a moment, tags, and compares the view of that moment with the disk.
func (r *run) compare(ctx context.Context) error {
	r.screen.title("Compare the replica with the disk")
	var source [][32]byte
	var tag *farsidev1.TagPoint
	start := time.Now()
	buf := make([]byte, blockSum)
	err := r.scene.frozen(ctx, func(ctx context.Context, disk io.ReaderAt) (err error) {
		if tag, err = r.stage.Far.Tag(ctx, "compared"); err != nil {
			return err
		}
		source, err = sums(ctx, disk, r.DiskSize, buf)
		return err
	})
	if err != nil {
		return err
	}
	p := tag.GetPosition()
	r.screen.say("disk frozen for %.0f ms; tag at %d:%d", milliseconds(time.Since(start)), p.GetTimeline(), p.GetSeq())
	view, err := r.stage.Far.Open(ctx, &farsidev1.Selector{Point: &farsidev1.Selector_Position{Position: p}}, false)
	if err != nil {
		return err
	}
	replica, err := sums(ctx, view.Disk, r.DiskSize, buf)
	if e := r.stage.Far.Close(ctx, view); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	if at := differing(source, replica); at >= 0 {
		r.screen.say("THE REPLICA DIFFERS in the MiB at %d", int64(at)*blockSum)
		return nil
	}
	r.result.ReplicaEqual = true
	r.screen.say("all %s equal, byte by byte (by SHA-256 of each MiB)", inUnits(r.DiskSize))
	return nil
}
