package e2e

import (
	"context"
	"path/filepath"
	"sync"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/testenv"
	"farside/test/load"
	"farside/test/wan"
)

// A file of 4 MiB is overwritten at 12 MB/s, and for 20 s or more the WAN takes a tenth of that. The RPO
// becomes half of what it would be without folding, recovers as soon as the WAN is well, then each write is a point
// again; the history shows the span, and the head equals the device.
func TestFoldUnderLag(t *testing.T) {
	testenv.NeedEBPF(t)
	t.Parallel()
	const churn, thin, lag = 12_000_000, 1_200_000, 20 * time.Second
	f := kindle(t, labOptions{size: 128 << 20}, 1)
	ctx, cancel := context.WithCancel(t.Context())
	var churning sync.WaitGroup
	defer churning.Wait()
	defer cancel()
	churning.Go(func() {
		if _, err := load.Churn(ctx, filepath.Join(f.mount, "hot"), 4<<20, churn, 1); err != nil {
			t.Error(err)
		}
	})
	f.protect(f.loop.Device)
	f.exact(time.Minute)
	time.Sleep(2 * time.Second)
	f.wan.Set(wan.Line{Rate: thin, Delay: 10 * time.Millisecond})
	began := time.Now()
	m := f.until(2*lag, "the spool is folded", func(m *farsidev1.Machine) bool {
		return m.GetStream().GetBehind() && m.GetStream().GetFolds() > 0
	})
	t.Logf("folded after %.1f s: %d to %d bytes, link %d bytes a second", time.Since(began).Seconds(),
		m.GetStream().GetFoldBytesBefore(), m.GetStream().GetFoldBytesAfter(), m.GetStream().GetLinkBytesPerSecond())
	time.Sleep(time.Until(began.Add(lag)))
	// Without folding the far side would be 0.9 s further behind with each second: 18 s now, and more
	// with each look.
	m = f.until(40*time.Second, "the RPO is half of that", func(m *farsidev1.Machine) bool { return m.GetRpo().GetNowMs() < 9000 })
	t.Logf("RPO %d ms after %.1f s of a thin WAN", m.GetRpo().GetNowMs(), time.Since(began).Seconds())
	f.wan.Set(wan.Line{})
	began = time.Now()
	f.until(10*time.Second, "the RPO has recovered", func(m *farsidev1.Machine) bool { return m.GetRpo().GetNowMs() < 1000 })
	recovered := time.Since(began)
	f.until(20*time.Second, "the link keeps up", func(m *farsidev1.Machine) bool { return !m.GetStream().GetBehind() })
	t.Logf("RPO below 1 s after %.1f s, caught up after %.1f s", recovered.Seconds(), time.Since(began).Seconds())
	cancel()
	churning.Wait()
	f.headEqualsDevice("after the lag")
	f.spans()
}

// spans checks that the history has an epoch span that says why, and is exact at its end.
func (f *fire) spans() {
	f.t.Helper()
	list, err := f.stage.Far.Client.ListPoints(f.t.Context(), &farsidev1.ListPointsRequest{Machine: f.stage.Far.Machine})
	if err != nil {
		f.t.Fatal(err)
	}
	r := list.GetSpans()
	folded := 0
	for _, s := range r {
		if s.GetReason() == "link-behind" && s.GetAccuracy() == farsidev1.Accuracy_ACCURACY_EPOCH && !s.GetOpen() {
			folded++
		}
	}
	if n := len(r); n == 0 || folded == 0 || r[n-1].GetAccuracy() != farsidev1.Accuracy_ACCURACY_EXACT || r[n-1].GetOpen() {
		f.t.Errorf("%d folded spans in %v", folded, r)
	}
}
