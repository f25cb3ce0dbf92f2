package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/test/load"
	"farside/test/wan"
)

// fire is a lab in which something breaks under load and nobody does anything
// about it but start again what has ended, as a service manager would.
type fire struct {
	*lab
	rng *rand.Rand
	wan *wan.Proxy // between the process server and the master target

	began time.Time     // since when nobody froze the file system
	worst time.Duration // between two commits of the load, but for freezes
}

// stillness is how long no commit of the load may return, on a machine that is busy
// with other tests. The source must never wait for the far side.
const stillness = 5 * time.Second

// compare is headEqualsDevice; it looks first whether the load was held up.
func (f *fire) compare(name string) *farsidev1.TagPoint {
	f.t.Helper()
	pause := f.oracle.LongestPause(f.began.UnixNano(), time.Now().UnixNano())
	if f.worst = max(f.worst, pause); pause > stillness {
		f.t.Errorf("%s: the load stood still for %v", name, pause)
	}
	tag := f.headEqualsDevice(name)
	f.began = time.Now()
	return tag
}

// long says whether faults last as long as they are meant to, not only seconds.
func long() bool { return os.Getenv("FARSIDE_LONG") == "1" }

// duration returns how long a fault lasts.
func duration(quick, full time.Duration) time.Duration {
	if long() {
		return full
	}
	return quick
}

// burn sets a deployment up under load, lets fault happen, waits until every write
// is a point again, and judges: the head equals the device, the positions that are
// offered are right, the load's commits were never held up, and what the
// machine's history tells holds what is wanted.
func burn(t *testing.T, o labOptions, fault func(*fire), wanted ...string) {
	t.Parallel()
	seed := seedOf(t)
	f := kindle(t, o, seed)
	var tag *farsidev1.TagPoint
	f.load(func() {
		f.protect(f.loop.Device)
		f.exact(time.Minute)
		time.Sleep(time.Second)
		began := time.Now()
		f.began = began
		fault(f)
		ended := time.Now()
		m := f.until(duration(2*time.Minute, 15*time.Minute), "the far side has caught up", func(m *farsidev1.Machine) bool {
			return m.GetState() == farsidev1.MachineState_MACHINE_STATE_PROTECTED && m.GetRpo().GetKnown() && m.GetRpo().GetNowMs() < 2000
		})
		t.Logf("the fault took %.1f s; well again %.1f s after it, with %d bytes in the vault", ended.Sub(began).Seconds(), time.Since(ended).Seconds(), m.GetUsedBytes())
		time.Sleep(time.Second)
		tag = f.compare("after the fire")
		t.Logf("no two commits of the load were more than %v apart", f.worst)
	})
	if tag == nil || t.Failed() {
		return
	}
	f.right(f.positions(f.rng, 6, nil, tag.GetPosition()))
	f.history(wanted)
}

// seedOf returns FARSIDE_SEED, or 1, and says how to do the same again if the test fails.
func seedOf(t *testing.T) uint64 {
	seed, err := strconv.ParseUint(os.Getenv("FARSIDE_SEED"), 10, 64)
	if err != nil {
		seed = 1
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("again: FARSIDE_SEED=%d FARSIDE_LONG=%s go test -count=1 -run '^%s$' ./test/e2e", seed, os.Getenv("FARSIDE_LONG"), t.Name())
		}
	})
	return seed
}

// kindle sets up the deployment, with a proxy for a WAN.
func kindle(t *testing.T, o labOptions, seed uint64) *fire {
	mt := "127.0.0.1:" + freePort(t)
	proxy, err := wan.Listen(mt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := proxy.Close(); err != nil {
			t.Error(err)
		}
	})
	if o.settings == nil {
		o.settings = map[string]map[string]string{}
	}
	o.settings["master-target"] = map[string]string{"listen": mt, "advertise": proxy.Addr()}
	l := newLab(t, o)
	l.slow = 3 // several of these run beside each other
	return &fire{lab: l, rng: rand.New(rand.NewPCG(seed, 1)), wan: proxy}
}

// pause waits a random time.
func (f *fire) pause(least, most time.Duration) {
	time.Sleep(least + time.Duration(f.rng.Int64N(int64(most-least))))
}

// kill ends a role as a crash would and starts it again a little later; meanwhile
// is called in between.
func (f *fire) kill(role string, meanwhile func()) {
	f.t.Helper()
	if err := f.stage.Halt(role, true); err != nil {
		f.t.Fatal(err)
	}
	if meanwhile != nil {
		meanwhile()
	}
	f.pause(0, 400*time.Millisecond)
	if err := f.stage.Again(role); err != nil {
		f.t.Fatal(err)
	}
}

// history checks that the machine's events name the codes that are wanted.
func (f *fire) history(wanted []string) {
	f.t.Helper()
	m, err := f.stage.Far.State(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	seen := map[string]int{}
	for _, e := range m.GetEvents() {
		seen[e.GetCode()]++
	}
	r, err := f.stage.Far.Client.ListPoints(f.t.Context(), &farsidev1.ListPointsRequest{Machine: f.stage.Far.Machine})
	if err != nil {
		f.t.Fatal(err)
	}
	kinds := map[string]int{}
	for _, s := range r.GetSpans() {
		kind := s.GetAccuracy().String()
		if s.GetOpen() {
			kind = "open"
		}
		kinds[kind]++
	}
	f.t.Logf("events %v, spans %v, rpo %v", seen, kinds, m.GetRpo())
	for _, code := range wanted {
		if seen[code] == 0 {
			f.t.Errorf("no event says %q: %v", code, m.GetEvents())
		}
	}
}

// TestFireKill: each role is killed 20 times at random moments, and started again.
func TestFireKill(t *testing.T) {
	for _, role := range []string{"agent", "process-server", "master-target", "config-server"} {
		t.Run(role, func(t *testing.T) {
			burn(t, labOptions{size: fireDisk, pin: role == "agent"}, func(f *fire) {
				for i := range 20 {
					f.pause(50*time.Millisecond, 900*time.Millisecond)
					f.kill(role, nil)
					if i%7 == 6 {
						f.exact(time.Minute)
						f.compare(fmt.Sprintf("after %d kills", i+1))
					}
				}
			})
		})
	}
}

const fireDisk = 192 << 20

// TestFireSpoolDeleted: what the process server had stored and not yet passed on is gone.
func TestFireSpoolDeleted(t *testing.T) {
	burn(t, labOptions{size: fireDisk}, func(f *fire) {
		f.wan.Set(wan.Line{Cut: true}) // so that there is something to lose
		time.Sleep(2 * time.Second)
		f.kill("process-server", func() {
			spool := filepath.Join(f.dir, "process-server", "spool")
			entries, err := os.ReadDir(spool)
			if err != nil || len(entries) == 0 {
				f.t.Fatalf("no spool to delete: %v", err)
			}
			if err := os.RemoveAll(spool); err != nil {
				f.t.Fatal(err)
			}
			f.wan.Set(wan.Line{})
		})
	}, "receiver-gap")
}

// TestFireVaultTruncated: the newest of what the master target had called durable is gone:
// a little, which the process server may still hold, or most of it.
func TestFireVaultTruncated(t *testing.T) {
	t.Run("a little", func(t *testing.T) { truncateVault(t, 1.0/32) })
	t.Run("most", func(t *testing.T) { truncateVault(t, 3.0/4, "receiver-gap") })
}

func truncateVault(t *testing.T, share float64, wanted ...string) {
	burn(t, labOptions{size: fireDisk + churnFile}, func(f *fire) {
		if len(wanted) > 0 { // so much that the process server has freed some of it
			f.churn(func() { time.Sleep(5 * time.Second) })
		}
		f.kill("master-target", func() {
			names, err := filepath.Glob(filepath.Join(f.dir, "master-target", "vaults", "*", "log", "*.seg"))
			if err != nil || len(names) == 0 {
				f.t.Fatalf("no segments: %v", err)
			}
			last := names[len(names)-1]
			s, err := os.Stat(last)
			if err != nil {
				f.t.Fatal(err)
			}
			size := s.Size() - int64(float64(s.Size())*share) - f.rng.Int64N(5000)
			f.t.Logf("%s: from %d bytes to %d", filepath.Base(last), s.Size(), size)
			if err := os.Truncate(last, size); err != nil {
				f.t.Fatal(err)
			}
		})
	}, wanted...)
}

// TestFireSpoolFull: the process server's disk is full for a while.
func TestFireSpoolFull(t *testing.T) {
	dir := workDir(t)
	disk, err := load.NewLoop(filepath.Join(dir, "spool.img"), 96<<20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { disk.Close() })
	mount := filepath.Join(dir, "spool")
	if err := disk.Format("ext4"); err != nil {
		t.Fatal(err)
	}
	unmount, err := disk.Mount(mount)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmount(); err != nil {
			t.Error(err)
		}
	})
	settings := map[string]map[string]string{"process-server": {"spool": filepath.Join(mount, "spool")}}
	burn(t, labOptions{size: fireDisk, settings: settings}, func(f *fire) {
		filler := filepath.Join(mount, "filler")
		file, err := os.Create(filler)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		for until := time.Now().Add(duration(12*time.Second, time.Minute)); time.Now().Before(until); {
			if _, err := file.Write(make([]byte, 64<<10)); err != nil {
				time.Sleep(10 * time.Millisecond) // full; again, lest what was freed meanwhile is used
			}
		}
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
	})
}

// churn writes beside the load at 54 MB/s while fn runs.
func (f *fire) churn(fn func()) {
	f.t.Helper()
	ctx, cancel := context.WithCancel(f.t.Context())
	var g errgroup.Group
	var written int64
	began := time.Now()
	g.Go(func() (err error) {
		written, err = load.Churn(ctx, filepath.Join(f.mount, "churn"), churnFile, churnRate, 1)
		return err
	})
	fn()
	cancel()
	if err := g.Wait(); err != nil {
		f.t.Errorf("churn: %v", err)
	}
	f.t.Logf("churn: %.1f MB/s", float64(written)/1e6/time.Since(began).Seconds())
}

const (
	churnRate = 54_000_000
	churnFile = 64 << 20
)

// TestFireWANCut: the WAN is cut under churn.
func TestFireWANCut(t *testing.T) {
	burn(t, labOptions{size: fireDisk + churnFile}, func(f *fire) {
		f.churn(func() {
			f.wan.Set(wan.Line{Cut: true})
			time.Sleep(duration(15*time.Second, 10*time.Minute))
			f.wan.Set(wan.Line{})
			time.Sleep(time.Second)
		})
	})
}

// TestFireThinWAN: the link carries a tenth of the churn for a while.
func TestFireThinWAN(t *testing.T) {
	burn(t, labOptions{size: fireDisk + churnFile}, func(f *fire) {
		f.churn(func() {
			f.wan.Set(wan.Line{Rate: churnRate / 10, Delay: 20 * time.Millisecond})
			time.Sleep(duration(15*time.Second, time.Minute))
		})
		f.wan.Set(wan.Line{})
	})
}

// TestFireUpgrade: the agent is replaced by another program under load.
func TestFireUpgrade(t *testing.T) {
	burn(t, labOptions{size: fireDisk, pin: true}, func(f *fire) {
		for i := range 3 {
			if err := f.stage.Halt("agent", false); err != nil {
				t.Fatal(err)
			}
			other := filepath.Join(f.dir, fmt.Sprintf("farside-%d", i))
			if err := copySparse(f.stage.Program, other); err != nil {
				t.Fatal(err)
			}
			f.stage.Program = other
			if err := f.stage.Again("agent"); err != nil {
				t.Fatal(err)
			}
			f.pause(time.Second, 2*time.Second)
		}
	})
}

// TestFireOverflows: five times the ring overflows, and the stream becomes exact again
// in between.
func TestFireOverflows(t *testing.T) {
	burn(t, labOptions{size: fireDisk + churnFile, ring: "1MiB"}, func(f *fire) {
		for range 5 {
			before := f.exact(time.Minute).GetCounters().GetOverflows()
			f.churn(func() {
				f.until(time.Minute, "an overflow", func(m *farsidev1.Machine) bool { return m.GetCounters().GetOverflows() > before })
			})
		}
	}, "overflow")
}
