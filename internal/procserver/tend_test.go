package procserver

import (
	"context"
	"math/rand/v2"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/transport"
	"farside/internal/vfs"
	"farside/test/wan"
)

// churn makes n frames of 16 KiB that can't be compressed and write to a few places.
func churn(t testing.TB, n, places int) (out [][]byte) {
	t.Helper()
	rng, noise := rand.New(rand.NewPCG(7, 7)), rand.NewChaCha8([32]byte{7})
	e := frame.NewEncoder(origin, frame.None)
	data := make([]byte, 16<<10)
	for i := range n {
		noise.Read(data)
		e.Begin(frame.Changes, dr.Exact, false)
		if _, err := e.Add(dr.Extent{Offset: rng.Int64N(int64(places)) << 14, Length: 16 << 10}, dr.Data, int64(i), data); err != nil {
			t.Fatal(err)
		}
		b, err := e.Finish()
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b)
	}
	return out
}

// through makes the WAN of the site a line.
func (s *site) through(line wan.Line) *wan.Proxy {
	p := wan.New(func(context.Context) (net.Conn, error) {
		a, b := transport.Pipe(psPeer, mtPeer)
		s.receive(b)
		return a, nil
	})
	p.Set(line)
	s.proxy = p
	return p
}

// age is how old the oldest change is that the master target lacks, by its number:
// the agent sends one each 10 ms.
func (s *site) age(a *agent) time.Duration {
	a.mu.Lock()
	next := a.next
	a.mu.Unlock()
	return time.Duration(next-int(s.target.Cursor().Position.Seq)) * 10 * time.Millisecond
}

// The WAN takes a tenth of the churn for a minute. The RPO stays bounded, what arrives is
// right, and when the WAN is well again every change arrives as it is.
func TestFoldsWhenTheLinkIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		p := s.through(wan.Line{})
		defer p.Close()
		a := &agent{frames: churn(t, 9000, 16), every: 10 * time.Millisecond}
		s.during(t.Context(), []*agent{a}, func(srv *server) {
			time.Sleep(10 * time.Second)
			if st := srv.stream(machine).paceNow(); st.behind || st.folds > 0 {
				t.Errorf("behind without a reason: %+v", st.settings)
			}
			p.Set(wan.Line{Rate: 160 << 10}) // of 1.6 MiB/s
			time.Sleep(30 * time.Second)
			worst := time.Duration(0)
			for range 300 {
				time.Sleep(100 * time.Millisecond)
				worst = max(worst, s.age(a))
			}
			st := srv.stream(machine).paceNow()
			if worst > 12*time.Second || !st.behind || st.folds == 0 || st.folded.After*4 > st.folded.Before {
				t.Errorf("RPO up to %v, %+v", worst, st.folded)
			}
			p.Set(wan.Line{})
			time.Sleep(3 * time.Second)
			if age := s.age(a); age > time.Second {
				t.Errorf("RPO %v after 3 s", age)
			}
			waitDurable(t, a)
			time.Sleep(2 * aheadFor)
			if st := srv.stream(machine).paceNow(); st.behind {
				t.Errorf("still behind: %+v", st.settings)
			}
		})
		checkTarget(t, s.target, a.frames)
		for i, f := range s.target.got[len(s.target.got)-1000:] {
			if f.Folded {
				t.Fatalf("frame %d of the last thousand is folded", i)
			}
		}
	})
}

func (s *stream) paceNow() pace {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.pace
}

func TestAgeOfTheBacklog(t *testing.T) {
	var p pace
	at := func(n int) time.Time { return time.Unix(int64(n), 0) }
	if d := p.age(10, 10, at(1)); d != 0 {
		t.Errorf("nothing waits: %v", d)
	}
	p.age(20, 10, at(2))
	if d := p.age(30, 10, at(5)); d != 3*time.Second {
		t.Errorf("20 waits since second 2: %v", d)
	}
	if d := p.age(30, 20, at(6)); d != time.Second {
		t.Errorf("30 waits since second 5: %v", d)
	}
	for n := range 3 * maxMarks {
		if d := p.age(dr.Seq(31+n), 20, at(7+n)); d != time.Duration(2+n)*time.Second || len(p.marks) > maxMarks {
			t.Fatalf("tick %d: %v, %d marks", n, d, len(p.marks))
		}
	}
	if d := p.age(dr.Seq(30+3*maxMarks), dr.Seq(30+3*maxMarks), at(1<<20)); d != 0 || len(p.marks) != 0 {
		t.Errorf("all is durable: %v", d)
	}
}

// Power cuts of the process server while it folds for a slow link: nothing that was
// stored is asked for again, and the master target ends with what was sent.
func TestFoldsAndCrashes(t *testing.T) {
	seeds := uint64(4)
	if testing.Short() {
		seeds = 1
	}
	for seed := range seeds {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 3))
			s := newSite(t)
			p := s.through(wan.Line{Rate: 160 << 10})
			defer p.Close()
			a := &agent{frames: churn(t, 3000, 16), every: 10 * time.Millisecond, pause: 20 * time.Millisecond}
			folds := 0
			for round := 0; a.durable() < 3000; round++ {
				if round > 50 {
					t.Fatalf("no progress beyond %d", a.durable())
				}
				s.during(t.Context(), []*agent{a}, func(srv *server) {
					time.Sleep(time.Duration(3000+rng.IntN(12_000))*time.Millisecond + 137*time.Microsecond)
					folds += srv.stream(machine).paceNow().folds
					if rng.IntN(3) > 0 {
						a.setDeaf(true)
						s.fs = s.fs.(*vfs.Mem).Crash(rng.Uint64())
					}
				})
				a.setDeaf(false)
				if round == 6 {
					p.Set(wan.Line{})
				}
			}
			if a.lost != 0 || folds == 0 {
				t.Errorf("change %d was stored, and asked for again; %d folds", a.lost, folds)
			}
			checkTarget(t, s.target, a.frames)
		})
	}
}
