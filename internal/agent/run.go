package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/blockdev"
	"farside/internal/control"
	"farside/internal/dr"
	"farside/internal/fsmap"
	"farside/internal/link"
	"farside/internal/quiesce"
	"farside/internal/transport"
)

const (
	reportEvery   = 5 * time.Second
	discoverEvery = reportEvery // so that a disk that grew is followed at once
)

// Run is the agent: it does what the configuration server assigns until ctx
// ends, and then returns nil. Errors wrap dr.ErrNotFound if the node has not
// joined, and dr.ErrInvalid if it joined as something else.
func Run(ctx context.Context, c Config, log *slog.Logger) (err error) {
	// From here on nothing may wait for a disk that is frozen, or full.
	log, stop := newPatientLog(log)
	defer stop()
	if _, err := quiesce.LockProgram(); err != nil {
		log.Warn("the program may have to be read from disk while that is frozen", "error", err)
	}
	client, err := control.Open(control.Options{DataDir: c.Data, Version: c.Version, Log: log})
	if err != nil {
		return fmt.Errorf("start agent: %w", err)
	}
	defer func() { err = errors.Join(err, client.Close()) }()
	if role := client.Identity().Peer().Role; role != transport.RoleAgent {
		return fmt.Errorf("start agent: %s is the data directory of a %s: %w", c.Data, role, dr.ErrInvalid)
	}
	machine := client.Identity().Peer().Machine
	thawLeft(c.Points.ledger(machine), log)
	d, err := openDrivers(c.Capture, machine)
	if err != nil {
		return fmt.Errorf("start agent: %w", err)
	}
	defer func() { err = errors.Join(err, d.Close()) }()

	a := newAgent(d.open, dialAs(client.Identity()), int64(c.Memory), log)
	a.compareRate, a.skipFree, a.freeTaker = int64(c.Compare.Rate), c.Compare.kinds(), fsmap.NewTaker()
	a.news, a.now, a.boot = client.ReportSoon, client.ServerTime, boot
	r := &reporter{agent: a, machine: machine, root: os.DirFS("/"), want: wantedOf(c), more: d.offered}
	a.background = newBackground(c.Compare.Every, client, log)
	a.release = d.release
	a.limit = limitGo
	a.recall(newRecord(client, control.Host().GetBootId(), log, func(path string) (uint64, bool) {
		return blockdev.Written(os.DirFS("/"), canonical(path))
	}))
	defer a.record.ended()
	a.still = newStillness(quiesceWith(c.Points.ledger(machine)), c.Points.hooks(c.Data, machine))
	var wg sync.WaitGroup
	wg.Go(a.recoverHooks(machine))
	for _, part := range []func() error{
		func() error {
			return client.Watch(ctx, func(w *pb.Assignment) { a.assign(w.GetAgent()) })
		},
		func() error { return client.Report(ctx, r.report, reportEvery) },
		func() error { return a.run(ctx) },
		func() error { return a.watchDevices(ctx, offerOf(wantedOf(c))) },
	} {
		wg.Go(func() {
			if err := part(); err != nil && ctx.Err() == nil {
				log.Error("part of the agent ended", "error", err) // none does before ctx ends
			}
		})
	}
	wg.Wait()
	return nil
}

// thawLeft thaws what an earlier agent left frozen that was killed together with its
// watchdog. Nothing was written to disk before.
func thawLeft(ledger string, log *slog.Logger) {
	thawed, err := quiesce.ThawLeft(ledger)
	if len(thawed) > 0 || err != nil {
		log.Warn("an earlier agent left file systems frozen; they are thawed", "mounts", thawed, "error", err)
	}
}

// boot returns what tells this run of this system from others, a clone's above all; zero where
// the system doesn't say.
func boot() link.Boot { return bootOf(control.Host(), time.Now()) }

func bootOf(h *pb.HostInfo, now time.Time) link.Boot {
	id, err := dr.ParseNodeID(h.GetBootId())
	if err != nil || h.GetBootNs() == 0 {
		return link.Boot{}
	}
	// Linux tells when it booted by the same clock, also after that was set.
	return link.Boot{ID: id, Up: max(0, now.Sub(time.Unix(0, h.GetBootNs())))}
}

// dialAs returns a dialer that proves to be id and wants to find the process
// server that it was told to.
func dialAs(id *transport.Identity) dialer {
	return func(ctx context.Context, node, addr string) (net.Conn, error) {
		want := transport.Peer{Role: transport.RoleProcessServer}
		if node != "" {
			n, err := dr.ParseNodeID(node)
			if err != nil {
				return nil, fmt.Errorf("dial process server: %w", err)
			}
			want.Node = n
		}
		return id.DialPeer(ctx, addr, want)
	}
}

func wantedOf(c Config) wanted {
	w := wanted{loops: c.LoopDevices, paths: c.Disks}
	for _, t := range c.Capture.Tap.Disks {
		w.paths = append(w.paths, t.Path)
	}
	return w
}

// reporter makes the agent's reports. It belongs to one goroutine.
type reporter struct {
	agent   *agent
	machine dr.MachineID
	root    fs.FS
	want    wanted
	more    func() []found // besides what is in root; may be nil

	disks   []*pb.DiscoveredDisk
	scanned time.Time
}

func (r *reporter) report() *pb.Report {
	now := time.Now()
	if now.Sub(r.scanned) >= discoverEvery {
		all := discover(r.root, r.want)
		if r.more != nil {
			all = append(all, r.more()...)
		}
		r.disks, r.scanned = discovered(all), now
	}
	a := r.agent.report(now)
	a.MachineId, a.Discovered = r.machine.String(), r.disks
	return &pb.Report{Work: &pb.Report_Agent{Agent: a}, Notices: noticesOf(r.agent.points.alerts(now))}
}
