package bench

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/demo/stage"
	"farside/internal/testenv"
	"farside/test/load"
)

const (
	pipelineDisk  = 1 << 30
	pipelineBytes = 512 << 20
	steadyRate    = 54_000_000 // bytes per second: what the predecessor allowed a machine
)

// pipeline is a disk in memory that real roles replicate to a vault on disk.
type pipeline struct {
	t     *testing.T
	dir   string
	loop  *load.Loop
	stage *stage.Stage
	fd    int
	data  []byte // random, aligned for direct writes
}

// program builds farside; with cores it is a script that keeps the roles on the first two
// and tells Go so.
func program(t *testing.T, dir string, twoCores bool) string {
	t.Helper()
	self := filepath.Join(dir, "farside")
	build := exec.Command("go", "build", "-trimpath", "-o", self, "../../cmd/farside")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	if !twoCores {
		return self
	}
	testenv.NeedTool(t, "taskset")
	script := filepath.Join(dir, "farside-2")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nGOMAXPROCS=2 exec taskset -c 0,1 "+self+" \"$@\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return script
}

func newPipeline(t *testing.T, twoCores bool) *pipeline {
	testenv.NeedBench(t)
	testenv.NeedEBPF(t)
	testenv.NeedLoop(t)
	p := &pipeline{t: t, dir: t.TempDir()}
	var err error
	if p.loop, err = load.NewLoop(filepath.Join(memoryDir(t), "disk"), pipelineDisk); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.loop.Close() })
	if p.fd, err = unix.Open(p.loop.Device, unix.O_WRONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p.fd) })
	p.data = make([]byte, 32<<20+4096)
	p.data = p.data[4096-int(uintptr(unsafe.Pointer(&p.data[0]))%4096):][:32<<20]
	rand.NewChaCha8([32]byte{1}).Read(p.data)

	if p.stage, err = stage.Raise(t.Context(), stage.Options{Dir: p.dir, Program: program(t, p.dir, twoCores), Driver: "ebpf"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.stage.Strike() })
	f := &p.stage.Far
	if err := errors.Join(f.Offered(t.Context(), p.loop.Device), f.Protect(t.Context(), p.loop.Device, "ebpf")); err != nil {
		t.Fatal(err)
	}
	p.exact()
	return p
}

func (p *pipeline) exact() *farsidev1.Machine {
	p.t.Helper()
	var m *farsidev1.Machine
	err := stage.Poll(p.t.Context(), 2*time.Minute, "wait until the stream is exact", func(ctx context.Context) (ok bool, err error) {
		m, err = p.stage.Far.State(ctx)
		return m.GetState() == farsidev1.MachineState_MACHINE_STATE_PROTECTED && m.GetNewest() != nil, errors.Join(err, p.stage.Ended())
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return m
}

func (p *pipeline) write(off int64, n int, from int) {
	if _, err := unix.Pwrite(p.fd, p.data[from:from+n], off); err != nil {
		p.t.Fatal(err)
	}
}

// databaseLike makes p.data look as a database's pages do: of 8 KiB, a header, rows with
// rising numbers and repeated text, a third of a page random.
func (p *pipeline) databaseLike() {
	for at := 0; at < len(p.data); at += 8192 {
		page := p.data[at : at+8192]
		binary.LittleEndian.PutUint64(page, uint64(at))
		for row := 64; row+96 <= 5462; row += 96 {
			binary.LittleEndian.PutUint64(page[row:], uint64(at+row))
			copy(page[row+8:row+96], "account of the branch in the town; balance 0000000; filler                             ")
		}
	}
}

// TestDurableThroughput: so many bytes written at full speed, until the last of
// them is fsynced in the vault, two hops of mutual TLS, a spool and a journal
// away. The peer is nbdcopy of the same bytes over TLS to a file on the same disk, flushed: one hop, no
// journal.
func TestDurableThroughput(t *testing.T) {
	testenv.NeedBench(t)
	testenv.NeedTool(t, "nbdcopy", "nbdkit")
	for _, kind := range []string{"incompressible", "database-like"} {
		t.Run(kind, func(t *testing.T) {
			p := newPipeline(t, false)
			if kind == "database-like" {
				p.databaseLike()
			}
			source := filepath.Join(memoryDir(t), "bytes")
			p.copyTo(source)
			var ours, peer []float64
			for round := range Rounds() {
				began := time.Now()
				for done := 0; done < pipelineBytes; done += 1 << 20 {
					p.write(int64(done), 1<<20, done%len(p.data))
				}
				if _, err := p.stage.Far.Tag(t.Context(), fmt.Sprintf("round %d", round)); err != nil {
					t.Fatal(err)
				}
				ours = append(ours, pipelineBytes/1e6/time.Since(began).Seconds())
				peer = append(peer, pipelineBytes/1e6/p.nbdcopy(source).Seconds())
			}
			t.Logf("%d overflows in %d rounds; ours %.0f, peer %.0f", p.exact().GetCounters().GetOverflows(), Rounds(), ours, peer)
			Figure{"durable end to end, 512 MiB " + kind + ", vs nbdcopy over TLS", Median(ours), Median(peer), Median(ours) / Median(peer), "MB/s", Rounds()}.Print()
		})
	}
}

// copyTo writes the bytes of a round into a file.
func (p *pipeline) copyTo(file string) {
	f, err := os.Create(file)
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	for done := 0; done < pipelineBytes; done += len(p.data) {
		if _, err := f.Write(p.data); err != nil {
			p.t.Fatal(err)
		}
	}
}

// nbdcopy copies a file over TLS to a new one on the disk that the vault is on, and flushes.
func (p *pipeline) nbdcopy(source string) time.Duration {
	t := p.t
	keys, target := filepath.Join(p.dir, "keys.psk"), filepath.Join(p.dir, "copy")
	if err := os.WriteFile(keys, []byte("bench:"+strings.Repeat("5a", 32)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(target, nil, 0o600), os.Truncate(target, pipelineBytes)); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(target)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().(*net.TCPAddr)
	l.Close()
	server := exec.Command("nbdkit", "-f", "-i", "127.0.0.1", "-p", strconv.Itoa(addr.Port), "--tls=require", "--tls-psk="+keys, "file", target)
	server.Stderr = os.Stderr
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		server.Process.Kill()
		server.Wait()
	}()
	for range 500 {
		if c, err := net.Dial("tcp", addr.String()); err == nil {
			c.Close()
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	began := time.Now()
	out, err := exec.Command("nbdcopy", "--flush", source, fmt.Sprintf("nbds://bench@%s/?tls-psk-file=%s", addr, keys)).CombinedOutput()
	if err != nil {
		t.Fatalf("nbdcopy: %v: %s", err, out)
	}
	return time.Since(began)
}

// steady writes 4 to 64 KiB at random at a rate in bytes per second, and returns the rate that
// it came to.
func (p *pipeline) steady(rate float64, run time.Duration) float64 {
	rng := rand.New(rand.NewPCG(1, 1))
	written := 0
	began := time.Now()
	for time.Since(began) < run {
		if early := float64(written)/rate - time.Since(began).Seconds(); early > 0 {
			time.Sleep(time.Duration(early * 1e9))
		}
		n := 4096 * (1 + rng.IntN(16))
		p.write(4096*rng.Int64N((pipelineDisk-n64)/4096), n, 4096*rng.IntN(1000))
		written += n
	}
	return float64(written) / time.Since(began).Seconds()
}

const n64 = 64 << 10

// usage returns the processor time and the greatest resident memory of a role's process.
func (p *pipeline) usage(role string) (cpu time.Duration, peak int64) {
	p.t.Helper()
	i := slices.IndexFunc(p.stage.Processes, func(x *stage.Process) bool { return x.Name == role })
	pid := p.stage.Processes[i].PID()
	stat, err1 := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	status, err2 := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err := errors.Join(err1, err2); err != nil {
		p.t.Fatal(err)
	}
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+2:]))
	user, _ := strconv.ParseInt(f[11], 10, 64) // fields 14 and 15 of proc(5), in ticks of 10 ms
	system, _ := strconv.ParseInt(f[12], 10, 64)
	for line := range strings.Lines(string(status)) {
		if kib, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			fmt.Sscan(kib, &peak)
		}
	}
	return time.Duration(user+system) * 10 * time.Millisecond, peak << 10
}

// TestRPO: random writes of 4 to 64 KiB at a steady rate, all roles on two cores; the age of the
// oldest change when it became durable, as the agent measures it; what the agent needed for
// it. Then how long views take to open behind that history.
func TestRPO(t *testing.T) {
	p := newPipeline(t, true)
	const run = 30 * time.Second
	before, _ := p.usage("agent")
	rate := p.steady(steadyRate, run)
	after, peak := p.usage("agent")
	m := p.exact()
	r := m.GetRpo()
	t.Logf("%.1f MB/s; %d samples, %d overflows", rate/1e6, r.GetSamples(), m.GetCounters().GetOverflows())
	for _, v := range []struct {
		name string
		ms   int64
	}{{"p50", r.GetP50Ms()}, {"p99", r.GetP99Ms()}, {"max", r.GetMaxMs()}} {
		Figure{Name: "RPO at 54 MB/s of random 4 to 64 KiB, roles on 2 cores, " + v.name, Ours: float64(v.ms), Unit: "ms", Rounds: 1}.Print()
	}
	Figure{Name: "agent at 54 MB/s, processor", Ours: 100 * (after - before).Seconds() / run.Seconds(), Unit: "% of one core", Rounds: 1}.Print()
	Figure{Name: "agent at 54 MB/s, memory at its highest", Ours: float64(peak) / (1 << 20), Unit: "MiB", Rounds: 1}.Print()
	for _, writable := range []bool{false, true} {
		var ms []float64
		for range 10 {
			o, err := p.stage.Far.Open(t.Context(), &farsidev1.Selector{Point: &farsidev1.Selector_Latest{Latest: true}}, writable)
			if err != nil {
				t.Fatal(err)
			}
			ms = append(ms, o.View.GetStatus().GetOpenMs())
			if err := p.stage.Far.Close(t.Context(), o); err != nil {
				t.Fatal(err)
			}
		}
		Figure{Name: fmt.Sprintf("view open after that, writable %v", writable), Ours: Median(ms), Unit: "ms", Rounds: 10}.Print()
	}
}

// TestChurnLimit: the same at rising rates, each with a new deployment, up to the first at which
// the 99th percentile of the RPO is over 5 s.
func TestChurnLimit(t *testing.T) {
	testenv.NeedBench(t)
	const limit = 5000
	best := 0.0
	for _, mb := range []float64{100, 150, 200, 250, 300, 400, 600} {
		var rate float64
		var p99 int64
		t.Run(fmt.Sprintf("%.0f MB/s", mb), func(t *testing.T) {
			p := newPipeline(t, true)
			rate = p.steady(mb*1e6, 15*time.Second) / 1e6
			m := p.exact()
			p99 = m.GetRpo().GetP99Ms()
			t.Logf("%.1f MB/s: p99 %d ms, %d overflows", rate, p99, m.GetCounters().GetOverflows())
		})
		if p99 >= limit || rate < 0.9*mb { // too slow, or the writer is
			break
		}
		best = rate
	}
	Figure{Name: "churn that keeps the RPO's p99 below 5 s, roles on 2 cores", Ours: best, Unit: "MB/s", Rounds: 1}.Print()
}
