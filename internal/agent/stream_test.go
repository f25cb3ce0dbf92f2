package agent

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/link"
)

var twoDisks = []capture.Disk{{ID: 1, Path: "/dev/a", Size: 1 << 20}, {ID: 2, Path: "/dev/b", Size: 512 << 10}}

// writer keeps writing to a Mem until ctx ends.
func writer(ctx context.Context, mem *capturetest.Mem, every time.Duration) {
	rng := rand.New(rand.NewPCG(1, 2))
	for ctx.Err() == nil {
		d := mem.Disks()[rng.IntN(len(mem.Disks()))]
		data := bytes.Repeat([]byte{byte(rng.IntN(255) + 1)}, 512*(1+rng.IntN(16)))
		mem.Write(d.ID, rng.Int64N((d.Size-int64(len(data)))/512)*512, data)
		time.Sleep(every)
	}
}

// startStream runs a stream to the server in the bubble of a test.
func startStream(t *testing.T, mem *capturetest.Mem, f *fakeServer, change ...func(*tuning)) (s *stream, stop func() error) {
	tune := defaultTuning()
	for _, c := range change {
		c(&tune)
	}
	s = newStream(mem, streamConfig{
		machine: f.Cursor().Machine, timeline: 1, first: ReasonRestart, tune: tune,
		dial: f.dial, log: slog.New(slog.DiscardHandler), notices: &chronicle{}, news: func() {},
	})
	s.setServer(server{addrs: []string{"server"}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.run(ctx) }()
	return s, func() error {
		cancel()
		err := <-done
		f.hangUp()
		f.wg.Wait()
		return err
	}
}

// A machine that writes all the time, over a link that breaks every second:
// afterwards the far side is the same, without another sync.
func TestStreamSurvivesBreaks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := capturetest.NewMem(twoDisks...)
		mem.SetImage(1, bytes.Repeat([]byte{5}, 1<<20))
		f := newFakeServer(t, dr.MachineID{1}, twoDisks)
		s, stop := startStream(t, mem, f)
		ctx, cancel := context.WithCancel(t.Context())
		written := make(chan struct{})
		go func() { defer close(written); writer(ctx, mem, 2*time.Millisecond) }()
		for range 10 {
			time.Sleep(time.Second)
			f.hangUp()
		}
		cancel()
		<-written
		time.Sleep(3 * time.Second)
		snap := s.snapshot(time.Now())
		if snap.phase != Exact || snap.durable != snap.built || !snap.rpoKnown || snap.connected != "server" {
			t.Errorf("snapshot %+v", snap)
		}
		if snap.samples == 0 || snap.p50 < 20*time.Millisecond || snap.p50 > 100*time.Millisecond || snap.max > 2*time.Second {
			t.Errorf("RPO p50 %v p99 %v max %v of %d samples", snap.p50, snap.p99, snap.max, snap.samples)
		}
		if err := stop(); !errors.Is(err, context.Canceled) {
			t.Errorf("stopped with %v", err)
		}
		if !f.same(mem) || f.mu.resyncs != 1 || snap.stats.syncs != 1 || f.mu.dials < 10 {
			t.Errorf("same %v, %d resyncs, %d dials", f.same(mem), f.mu.resyncs, f.mu.dials)
		}
	})
}

// A server that is away for ten minutes costs an overflow and a sync, and no memory.
func TestStreamOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := capturetest.NewMem(twoDisks...)
		mem.SetRing(1 << 20)
		f := newFakeServer(t, dr.MachineID{1}, twoDisks)
		s, stop := startStream(t, mem, f, func(c *tuning) { c.memory = batchRoom + 1<<20 })
		time.Sleep(2 * time.Second)
		f.set(func() { f.mu.down = true })
		f.hangUp()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		writer(ctx, mem, 100*time.Millisecond)
		down := s.snapshot(time.Now())
		if down.bytes > s.rep.tune.memory || down.connected != "" || down.linkErr == nil || down.rpo < 9*time.Minute {
			t.Errorf("after the outage: %d bytes, RPO %v, %q %v", down.bytes, down.rpo, down.connected, down.linkErr)
		}
		f.set(func() { f.mu.down = false })
		time.Sleep(10 * time.Second)
		snap := s.snapshot(time.Now())
		if snap.phase != Exact || snap.why != ReasonOverflow || snap.rpo > time.Second {
			t.Errorf("%v because of %q, RPO %v", snap.phase, snap.why, snap.rpo)
		}
		stop()
		if !f.same(mem) {
			t.Error("the far side differs")
		}
	})
}

func TestStreamStandsDown(t *testing.T) {
	for name, c := range map[string]struct {
		refuse   error
		timeline dr.Timeline
		fenced   bool
	}{
		"refused":            {&link.Refused{Code: link.CodeTimeline, Text: "old"}, 1, true},
		"receiver is newer":  {nil, 2, true},
		"refused, not ready": {&link.Refused{Code: link.CodeNotReady, Text: "wait"}, 1, false},
		"receiver is older":  {nil, 0, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			f := newFakeServer(t, dr.MachineID{1}, twoDisks)
			f.mu.refuse, f.mu.at.Position.Timeline = c.refuse, c.timeline
			s, stop := startStream(t, capturetest.NewMem(twoDisks...), f)
			time.Sleep(time.Minute)
			snap := s.snapshot(time.Now())
			err := stop()
			if fenced := errors.Is(err, dr.ErrTimeline) && snap.phase == Fenced; fenced != c.fenced {
				t.Errorf("%s: fenced %v: %v, %v", name, fenced, snap.phase, err)
			}
			if f.mu.dials > 40 || !c.fenced && f.mu.dials < 5 {
				t.Errorf("%s: %d attempts in a minute", name, f.mu.dials)
			}
		})
	}
}

func TestStreamMovesToAnotherServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := capturetest.NewMem(twoDisks...)
		f := newFakeServer(t, dr.MachineID{1}, twoDisks)
		s, stop := startStream(t, mem, f)
		time.Sleep(time.Second)
		mem.Write(1, 0, sector(1))
		s.setServer(server{node: "n", addrs: []string{"other"}})
		s.setServer(server{node: "n", addrs: []string{"other"}})
		time.Sleep(time.Second)
		snap := s.snapshot(time.Now())
		stop()
		if snap.connected != "other" || snap.stats.syncs != 1 || f.mu.dials > 4 || !f.same(mem) {
			t.Errorf("connected to %q after %d dials, %d syncs, same %v", snap.connected, f.mu.dials, snap.stats.syncs, f.same(mem))
		}
	})
}
