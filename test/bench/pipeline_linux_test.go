package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
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
	steadyRate    = 54 << 20 // bytes per second: what the predecessor allowed a machine
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

func newPipeline(t *testing.T) *pipeline {
	testenv.NeedBench(t)
	testenv.NeedEBPF(t)
	testenv.NeedLoop(t)
	p := &pipeline{t: t, dir: t.TempDir()}
	self := filepath.Join(p.dir, "farside")
	build := exec.Command("go", "build", "-trimpath", "-o", self, "../../cmd/farside")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	var err error
	if p.loop, err = load.NewLoop(filepath.Join(memoryDir(t), "disk"), pipelineDisk); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.loop.Close() })
	if p.fd, err = unix.Open(p.loop.Device, unix.O_WRONLY|unix.O_DIRECT, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p.fd) })
	p.data = make([]byte, 32<<20+4096)
	p.data = p.data[4096-int(uintptr(unsafe.Pointer(&p.data[0]))%4096):][:32<<20]
	rand.NewChaCha8([32]byte{1}).Read(p.data)

	if p.stage, err = stage.Raise(t.Context(), stage.Options{Dir: p.dir, Program: self, Driver: "ebpf"}); err != nil {
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

// TestDurableThroughput: so many bytes written at full speed, until the last of
// them is fsynced in the vault, two hops of mutual TLS, a spool and a journal
// away; the peer is dd of the same bytes to a file on the same disk, with fsync.
func TestDurableThroughput(t *testing.T) {
	p := newPipeline(t)
	source := filepath.Join(memoryDir(t), "bytes")
	if err := os.WriteFile(source, p.data, 0o600); err != nil {
		t.Fatal(err)
	}
	var ours, dd []float64
	for round := range Rounds() {
		began := time.Now()
		for done := 0; done < pipelineBytes; done += 1 << 20 {
			p.write(int64(done), 1<<20, done%len(p.data))
		}
		if _, err := p.stage.Far.Tag(t.Context(), fmt.Sprintf("round %d", round)); err != nil {
			t.Fatal(err)
		}
		ours = append(ours, pipelineBytes/1e6/time.Since(began).Seconds())
		target := filepath.Join(p.dir, "dd")
		began = time.Now()
		cmd := exec.Command("sh", "-c", fmt.Sprintf("for i in $(seq %d); do cat %s; done | dd of=%s bs=1M iflag=fullblock conv=fsync status=none", pipelineBytes/len(p.data), source, target))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("dd: %v: %s", err, out)
		}
		dd = append(dd, pipelineBytes/1e6/time.Since(began).Seconds())
		if err := os.Remove(target); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d overflows in %d rounds", p.exact().GetCounters().GetOverflows(), Rounds())
	Figure{"durable end to end, 512 MiB incompressible vs dd conv=fsync", Median(ours), Median(dd), Median(ours) / Median(dd), "MB/s", Rounds()}.Print()
}

// TestRPO: random writes of 4 to 64 KiB at a steady rate; the age of the oldest
// change when it became durable, as the agent measures it. Then how long views
// take to open behind that history.
func TestRPO(t *testing.T) {
	p := newPipeline(t)
	rng := rand.New(rand.NewPCG(1, 1))
	began := time.Now()
	const run = 20 * time.Second
	for written := 0; ; {
		due := float64(written) / steadyRate
		late := time.Since(began).Seconds() - due
		if time.Since(began) > run {
			t.Logf("%.1f MB/s written, %.3f s late at the end", float64(written)/1e6/time.Since(began).Seconds(), late)
			break
		}
		if late < 0 {
			time.Sleep(time.Duration(-late * 1e9))
		}
		n := 4096 * (1 + rng.IntN(16))
		p.write(4096*rng.Int64N((pipelineDisk-n64)/4096), n, 4096*rng.IntN(1000))
		written += n
	}
	m := p.exact()
	r := m.GetRpo()
	t.Logf("%d samples, %d overflows", r.GetSamples(), m.GetCounters().GetOverflows())
	for name, v := range map[string]int64{"p50": r.GetP50Ms(), "p99": r.GetP99Ms(), "max": r.GetMaxMs()} {
		Figure{Name: "RPO at 54 MiB/s of random 4 to 64 KiB, " + name, Ours: float64(v), Unit: "ms", Rounds: 1}.Print()
	}
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

const n64 = 64 << 10
