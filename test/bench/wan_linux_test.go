package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/demo/stage"
	"farside/internal/testenv"
	"farside/test/load"
	"farside/test/wan"
)

const (
	wanDisk   = 512 << 20
	wanScale  = 5   // of pgbench: 75 MB of tables
	wanTPS    = 300 // transactions per second
	wanLength = 40 * time.Second
	rsyncEach = 10 * time.Second
)

// database is PostgreSQL on a disk in memory that real roles replicate through a proxy.
type database struct {
	t     *testing.T
	dir   string
	image string // the disk's content
	stage *stage.Stage
	line  *wan.Proxy
	pg    *load.Postgres
}

func newDatabase(t *testing.T) *database {
	testenv.NeedBench(t)
	testenv.NeedEBPF(t)
	testenv.NeedLoop(t)
	testenv.NeedTool(t, "rsync", "mkfs.ext4", "mount", "umount")
	if load.PostgresBin() == "" {
		testenv.Missing(t, "PostgreSQL")
	}
	base, err := os.MkdirTemp("", "farside-bench-pg") // where the user postgres may look
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	if err := os.Chmod(base, 0o777); err != nil {
		t.Fatal(err)
	}
	d := &database{t: t, dir: t.TempDir(), image: filepath.Join(memoryDir(t), "disk")}
	loop, err := load.NewLoop(d.image, wanDisk)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { loop.Close() })
	mount, sockets := filepath.Join(base, "mnt"), base
	if err := loop.Format("ext4"); err != nil {
		t.Fatal(err)
	}
	unmount, err := loop.Mount(mount)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unmount() })
	data := filepath.Join(mount, "pg")
	if err := load.InitPostgres(t.Context(), data, sockets, wanScale); err != nil {
		t.Fatal(err)
	}
	if d.pg, err = load.StartPostgres(t.Context(), data, sockets); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.pg.Stop() })
	d.replicate(loop.Device)
	return d
}

func (d *database) replicate(device string) {
	t := d.t
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := l.Addr().String()
	l.Close()
	if d.line, err = wan.Listen(target); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.line.Close() })
	d.stage, err = stage.Raise(t.Context(), stage.Options{
		Dir: d.dir, Program: program(t, d.dir, false), Driver: "ebpf",
		Settings: map[string]map[string]string{"master-target": {"listen": target, "advertise": d.line.Addr()}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.stage.Strike() })
	f := &d.stage.Far
	if err := errors.Join(f.Offered(t.Context(), device), f.Protect(t.Context(), device, "ebpf")); err != nil {
		t.Fatal(err)
	}
	(&pipeline{t: t, stage: d.stage}).exact()
}

// traffic is what was written and what went over the WAN for it.
type traffic struct {
	changed, wan, rsync int64
	rpo                 time.Duration // when the load ended
	arrived             time.Duration // from then until all was durable
	machine             *farsidev1.Machine
}

// run runs pgbench, and rsync beside it, and counts until all that was written is
// durable on the far side.
func (d *database) run() (x traffic) {
	t := d.t
	d.rsync() // the beginning is no change
	before := d.state()
	up, down := d.line.Bytes()
	ctx, cancel := context.WithCancel(t.Context())
	copied := make(chan int64, 1)
	go func() {
		var sum int64
		tick := time.NewTicker(rsyncEach)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				sum += d.rsync()
				continue
			case <-ctx.Done():
			}
			copied <- sum + d.rsync()
			return
		}
	}()
	if err := d.pg.BenchAt(t.Context(), wanTPS, wanLength); err != nil {
		t.Error(err)
	}
	cancel()
	x.machine = d.state()
	x.rpo = time.Duration(x.machine.GetRpo().GetNowMs()) * time.Millisecond
	began := time.Now()
	err := stage.Poll(t.Context(), 5*time.Minute, "wait until the far side has all", func(ctx context.Context) (bool, error) {
		m, err := d.stage.Far.State(ctx)
		return err == nil && m.GetRpo().GetNowMs() < 2000, d.stage.Ended()
	})
	if err != nil {
		t.Error(err)
	}
	x.arrived = time.Since(began)
	x.rsync = <-copied
	x.machine = d.state()
	x.changed = x.machine.GetCounters().GetBytesCaptured() - before.GetCounters().GetBytesCaptured()
	up2, down2 := d.line.Bytes()
	x.wan = up2 - up + down2 - down
	return x
}

func (d *database) state() *farsidev1.Machine {
	d.t.Helper()
	time.Sleep(1500 * time.Millisecond) // a report is up to a second old
	m, err := d.stage.Far.State(d.t.Context())
	if err != nil {
		d.t.Error(err)
	}
	return m
}

var sentReceived = regexp.MustCompile(`(?m)^Total bytes (?:sent|received): (\d+)$`)

// rsync copies the disk's content as it would be done to another machine, and returns
// the bytes that went either way.
func (d *database) rsync() (sum int64) {
	shell := filepath.Join(d.dir, "shell") // "logs in" to this machine
	if err := os.WriteFile(shell, []byte("#!/bin/sh\nshift\nexec \"$@\"\n"), 0o700); err != nil {
		d.t.Error(err)
		return 0
	}
	out, err := exec.Command("rsync", "-z", "--inplace", "--no-whole-file", "--ignore-times", "--stats", "--no-human-readable",
		"-e", shell, d.image, "there:"+filepath.Join(d.dir, "rsynced")).CombinedOutput()
	if err != nil {
		d.t.Errorf("rsync: %v: %s", err, out)
	}
	for _, m := range sentReceived.FindAllSubmatch(out, -1) {
		n, _ := strconv.ParseInt(string(m[1]), 10, 64) // digits
		sum += n
	}
	return sum
}

// TestWANBytes: what goes over the WAN, both ways, for each byte that PostgreSQL under pgbench
// writes: while every write becomes a point, and through a link of a quarter of that, where frames are folded.
// The peer is `rsync -z` of the disk every 10 s in the same time; it keeps no history, and what it copies is
// no state that the disk was ever in.
func TestWANBytes(t *testing.T) {
	d := newDatabase(t)
	exact := d.run()
	rate := int64(float64(exact.wan) / wanLength.Seconds() / 4)
	d.line.Set(wan.Line{Rate: rate, Delay: 10 * time.Millisecond})
	folded := d.run()
	s := folded.machine.GetStream()
	t.Logf("exact: %+v bytes changed, %d over the WAN, %d by rsync", exact.changed, exact.wan, exact.rsync)
	t.Logf("folded: %d bytes changed, %d over a WAN of %d bytes a second, %d by rsync; RPO %v at the end of the load, all durable %v later; %d runs, %d to %d bytes, compression %s",
		folded.changed, folded.wan, rate, folded.rsync, folded.rpo, folded.arrived, s.GetFolds(), s.GetFoldBytesBefore(), s.GetFoldBytesAfter(), s.GetCompression())
	for name, x := range map[string]traffic{"exact": exact, "folded, at a link of a quarter of that": folded} {
		ours, peer := float64(x.wan)/float64(x.changed), float64(x.rsync)/float64(x.changed)
		Figure{"WAN bytes per changed byte, pgbench, " + name, ours, peer, ours / peer, "of 1", 1}.Print()
	}
	Figure{Name: "RPO at the end of 40 s of that link", Ours: folded.rpo.Seconds(), Unit: "s", Rounds: 1}.Print()
	if s.GetFolds() == 0 {
		t.Error(fmt.Errorf("nothing was folded: %v", s))
	}
}
