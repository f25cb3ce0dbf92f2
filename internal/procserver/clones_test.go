package procserver

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/link"
)

func bootOf(n byte, up time.Duration) link.Boot { return link.Boot{ID: [16]byte{n}, Up: up} }

func TestClonesAdmit(t *testing.T) {
	type attempt struct {
		after  time.Duration // since the one before, or since what was heard
		heard  time.Duration // before that the known sender was heard for as long
		boot   link.Boot
		tl     dr.Timeline // 0: 1
		denied bool
	}
	day := 24 * time.Hour
	for name, tc := range map[string]struct {
		attempts []attempt
		notices  []string
	}{
		"agent restarted":    {[]attempt{{boot: bootOf(1, day)}, {after: time.Minute, boot: bootOf(1, day+time.Minute)}}, nil},
		"machine rebooted":   {[]attempt{{boot: bootOf(1, day)}, {heard: time.Hour, after: 30 * time.Second, boot: bootOf(2, 20*time.Second)}}, nil},
		"cloned, booted now": {[]attempt{{boot: bootOf(1, day)}, {heard: time.Hour, after: time.Second, boot: bootOf(2, 20*time.Second), denied: true}}, []string{"machine-cloned"}},
		"clone goes on trying": {
			[]attempt{
				{boot: bootOf(1, day)},
				{heard: time.Hour, boot: bootOf(2, time.Minute), denied: true},
				{heard: time.Minute, boot: bootOf(2, 2*time.Minute), denied: true},
				{heard: time.Second, boot: bootOf(1, day)},
				{heard: time.Hour, boot: bootOf(2, time.Hour), denied: true},
			}, []string{"machine-cloned", "machine-cloned"},
		},
		"the first is gone": {
			[]attempt{
				{boot: bootOf(1, day)},
				{heard: time.Hour, boot: bootOf(2, time.Minute), denied: true},
				{after: aliveFor - time.Second, boot: bootOf(2, 3*time.Minute), denied: true},
				{after: time.Second, boot: bootOf(2, 3*time.Minute)},
				{heard: time.Minute, boot: bootOf(1, 2*day), denied: true},
			}, []string{"machine-cloned", "machine-changed", "machine-cloned"},
		},
		"failed over":        {[]attempt{{boot: bootOf(1, day)}, {heard: time.Hour, boot: bootOf(2, time.Hour), tl: 2}}, nil},
		"one that can't say": {[]attempt{{boot: bootOf(1, day)}, {heard: time.Hour}, {heard: time.Hour, boot: bootOf(2, day)}}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var notices []string
			c := clones{notice: func(code string, _ pb.Severity, _ string) { notices = append(notices, code) }}
			now := time.Unix(1_000_000_000, 0)
			for i, a := range tc.attempts {
				now = now.Add(a.heard)
				if a.heard > 0 {
					c.heard(machine, now)
				}
				now = now.Add(a.after)
				err := c.admit(link.Hello{Machine: machine, Timeline: max(1, a.tl), Boot: a.boot}, now)
				if errors.Is(err, dr.ErrDenied) != a.denied || (err != nil) != a.denied {
					t.Errorf("attempt %d: %v", i, err)
				}
			}
			if len(notices) != len(tc.notices) {
				t.Fatalf("notices %v, want %v", notices, tc.notices)
			}
			for i := range notices {
				if notices[i] != tc.notices[i] {
					t.Errorf("notices %v, want %v", notices, tc.notices)
				}
			}
		})
	}
}

// TestCloneIsRefused: a clone that connects beside the machine is sent away, is told of, and the
// machine's own connection goes on as if nothing had been.
func TestCloneIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		srv, stop := s.start(ctx)
		first := &agent{frames: frames(t, origin, 300), every: 100 * time.Millisecond, boot: bootOf(1, time.Hour)}
		other := &agent{frames: frames(t, origin, 5), boot: bootOf(2, 10*time.Second)}
		ended := make(chan error, 1)
		for !srv.stream(machine).isReady() {
			time.Sleep(time.Millisecond)
		}
		go func() { ended <- connect(ctx, srv, first, agentPeer) }()
		time.Sleep(12 * time.Second)
		for range 5 {
			short, cancel := context.WithTimeout(ctx, time.Second)
			err := connect(short, srv, other, agentPeer)
			cancel()
			if !errors.Is(err, dr.ErrDenied) {
				t.Errorf("the clone: %v", err)
			}
			time.Sleep(time.Second)
		}
		waitDurable(t, first)
		if len(ended) != 0 {
			t.Errorf("the first one's connection ended: %v", <-ended)
		}
		if n := srv.report().GetNotices(); len(n) != 1 || n[0].GetCode() != "machine-cloned" || n[0].GetSeverity() != pb.Severity_SEVERITY_ERROR {
			t.Errorf("notices %v", n)
		}
		cancel()
		<-ended
		stop()
		checkTarget(t, s.target, first.frames)
	})
}

func (s *running) isReady() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.ready
}
