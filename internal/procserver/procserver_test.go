package procserver

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/link"
	"farside/internal/transport"
	"farside/internal/vfs"
	"farside/test/wan"
)

var (
	machine   = dr.MachineID{1}
	agentPeer = transport.Peer{Role: transport.RoleAgent, Node: dr.NodeID{1}, Machine: machine}
	psPeer    = transport.Peer{Role: transport.RoleProcessServer, Node: dr.NodeID{2}}
	mtPeer    = transport.Peer{Role: transport.RoleMasterTarget, Node: dr.NodeID{3}}
	origin    = frame.Cursor{Machine: machine, Position: dr.Position{Timeline: 1}}
)

// TestMain makes the compressor's shared state outside of any synctest bubble,
// since its channels are used in all of them.
func TestMain(m *testing.M) {
	e := frame.NewEncoder(origin, frame.Zstd)
	e.Begin(frame.Changes, dr.Exact, false)
	e.Add(dr.Extent{Length: 1 << 20}, dr.Data, 0, make([]byte, 1<<20))
	b, _ := e.Finish()
	f, err := frame.Parse(b)
	for c := range frame.MostCompression + 1 {
		if err == nil {
			_, err = f.Compress(c)
		}
	}
	if err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// random is a seeded source that goroutines may share.
type random struct {
	mu  sync.Mutex
	rng *rand.Rand
}

func (r *random) IntN(n int) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.rng.IntN(n)
}

func frames(t testing.TB, c frame.Cursor, n int) (out [][]byte) {
	t.Helper()
	e := frame.NewEncoder(c, frame.None)
	for i := range n {
		e.Begin(frame.Changes, dr.Exact, false)
		data := bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 256*(1+i%16))
		if _, err := e.Add(dr.Extent{Offset: int64(i) * 512, Length: int64(len(data))}, dr.Data, int64(i), data); err != nil {
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

// agent is a link.Source over frames that it keeps for ever.
type agent struct {
	mu     sync.Mutex
	frames [][]byte
	next   int
	ack    link.Ack
	pause  time.Duration // between connections
	every  time.Duration // between frames
	deaf   bool          // acknowledgements do not arrive any more
	boot   link.Boot     // of its system
	lost   dr.Seq        // first change that was stored once and asked for again
}

func (a *agent) Resume(at frame.Cursor, _ dr.Seq) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if at.Position.Seq < a.ack.Stored && a.lost == 0 {
		a.lost = at.Position.Seq + 1
	}
	for i, b := range a.frames {
		if h, _ := frame.ParseHeader(b); h.Prev == at.Position.Seq {
			a.next = i
			return nil
		}
	}
	a.next = len(a.frames)
	return nil
}

func (a *agent) Next(ctx context.Context) ([]byte, error) {
	time.Sleep(a.every)
	a.mu.Lock()
	if a.next < len(a.frames) {
		defer a.mu.Unlock()
		a.next++
		return a.frames[a.next-1], nil
	}
	a.mu.Unlock()
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

func (a *agent) Acked(ack link.Ack) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.deaf {
		a.ack = ack
	}
}

func (a *agent) setDeaf(deaf bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.deaf = deaf
}

func (a *agent) timeline() dr.Timeline {
	h, _ := frame.ParseHeader(a.frames[0])
	return h.Timeline
}

func (a *agent) durable() dr.Seq {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ack.Durable
}

// target is a master target: a link.Sink that keeps what it got.
type target struct {
	mu       sync.Mutex
	at       frame.Cursor
	got      []*frame.Frame
	progress *link.Progress
}

func newTarget(at frame.Cursor) *target {
	return &target{at: at, progress: link.NewProgress(link.Ack{Stored: at.Position.Seq, Durable: at.Position.Seq})}
}

func (m *target) Cursor() frame.Cursor { m.mu.Lock(); defer m.mu.Unlock(); return m.at }
func (m *target) Sync() error          { c := m.Cursor().Position.Seq; m.progress.Raise(c, c); return nil }

func (m *target) Progress() *link.Progress {
	return m.progress
}

func (m *target) Append(_ context.Context, fs []*frame.Frame) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range fs {
		if err := errors.Join(f.Check(m.at), f.VerifyChain(m.at.Chain)); err != nil {
			return err
		}
		m.at = f.End()
		m.got = append(m.got, f)
	}
	return nil
}

// site is a process server in memory with its agent and its master target.
type site struct {
	t       testing.TB
	fs      vfs.FS
	limit   int64
	wg      sync.WaitGroup // the master target's connections
	target  *target
	cut     func() bool // whether the WAN is cut right now
	breakAt func() int  // bytes after which a WAN connection breaks; 0 never
	proxy   *wan.Proxy  // or the WAN is this
}

// receive is the master target's end of a connection.
func (s *site) receive(conn net.Conn) {
	target := s.target
	s.wg.Go(func() {
		link.Receive(context.Background(), conn, func(context.Context, link.Hello) (link.Sink, error) { return target, nil })
	})
}

func (s *site) dial(ctx context.Context, _ route) (net.Conn, error) {
	if s.cut != nil && s.cut() {
		return nil, dr.ErrUnavailable
	}
	if s.proxy != nil {
		a, b := transport.Pipe(psPeer, mtPeer)
		s.proxy.Serve(b)
		return a, nil
	}
	a, b := transport.Pipe(psPeer, mtPeer)
	target := s.target
	s.wg.Go(func() {
		link.Receive(ctx, b, func(context.Context, link.Hello) (link.Sink, error) { return target, nil })
	})
	if s.breakAt != nil {
		return &breaking{a, s.breakAt()}, nil
	}
	return a, nil
}

type breaking struct {
	net.Conn
	left int
}

func (b *breaking) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		n, _ := b.Conn.Write(p[:max(0, len(p)+b.left)])
		b.Conn.Close()
		return n, net.ErrClosed
	}
	return b.Conn.Write(p)
}

func assignment() *pb.ProcessServerAssignment {
	return &pb.ProcessServerAssignment{Streams: []*pb.Stream{{
		MachineId: machine.String(), AgentNodeId: agentPeer.Node.String(), Timeline: 1,
		MasterTarget: &pb.Peer{NodeId: mtPeer.Node.String(), Addresses: []string{"x:1"}},
	}}}
}

// start runs a process server until stop is called.
func (s *site) start(ctx context.Context) (srv *server, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	srv = newServer(s.fs, "/spool", s.limit, s.dial, slog.New(slog.DiscardHandler))
	srv.assign(ctx, assignment())
	return srv, func() { cancel(); srv.close(); s.wg.Wait() }
}

// connect runs the agent's side against srv until ctx ends.
func connect(ctx context.Context, srv *server, a *agent, who transport.Peer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	left, right := transport.Pipe(who, psPeer)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { srv.links.Serve(ctx, right) })
	return link.Send(ctx, left, link.SenderOptions{Hello: link.Hello{Machine: machine, Timeline: a.timeline(), Boot: a.boot}, Source: a})
}

// keepConnected connects again and again.
func keepConnected(ctx context.Context, srv *server, a *agent) {
	for ctx.Err() == nil {
		connect(ctx, srv, a, agentPeer)
		time.Sleep(max(a.pause, time.Millisecond))
	}
}

func newSite(t testing.TB) *site {
	mem := vfs.NewMem()
	if err := errors.Join(mem.MkdirAll("/spool"), mem.SyncDir("/")); err != nil {
		t.Fatal(err)
	}
	return &site{t: t, fs: mem, limit: 1 << 30, target: newTarget(origin)}
}

// waitDurable waits on the fake clock until all of the agent's frames are durable.
func waitDurable(t testing.TB, a *agent) {
	t.Helper()
	last, _ := frame.ParseHeader(a.frames[len(a.frames)-1])
	for range 100_000 {
		if a.durable() == last.Last {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("durable up to %d of %d", a.durable(), last.Last)
}

// checkTarget compares what the master target got with what was sent: each frame,
// and, where frames were folded, what they make of a disk.
func checkTarget(t testing.TB, m *target, want [][]byte) {
	t.Helper()
	sent, disk, wanted := map[dr.Seq]*frame.Frame{}, map[int64]byte{}, map[int64]byte{}
	var last *frame.Frame
	for _, b := range want {
		w, err := frame.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		last, sent[w.Last] = w, w
		applyTo(t, wanted, w)
	}
	exact := 0
	for i, f := range m.got {
		w := sent[f.Last]
		if w == nil || w.End() != f.End() {
			t.Fatalf("frame %d ends where none did, at %v", i, f.Last)
		}
		applyTo(t, disk, f)
		if f.Folded {
			continue
		}
		exact++
		a, err1 := f.Payload(nil)
		b, err2 := w.Payload(nil)
		if err1 != nil || err2 != nil || !bytes.Equal(a, b) || f.First != w.First {
			t.Fatalf("frame %d differs: %v %v", i, err1, err2)
		}
	}
	if n := len(m.got); n == 0 || m.got[n-1].End() != last.End() || exact == n && n != len(want) {
		t.Fatalf("%d frames at the master target, want %d", len(m.got), len(want))
	}
	if !maps.Equal(disk, wanted) {
		t.Fatal("the disks differ")
	}
}

// applyTo notes the first byte of each sector that a frame writes.
func applyTo(t testing.TB, disk map[int64]byte, f *frame.Frame) {
	t.Helper()
	raw, err := f.Payload(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range f.All() {
		for off := int64(0); off < x.Length; off += dr.SectorSize {
			disk[x.Offset+off] = raw[int64(x.RawOff)+off]
		}
	}
}

func TestForward(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		ctx, cancel := context.WithCancel(t.Context())
		srv, stop := s.start(ctx)
		a := &agent{frames: frames(t, origin, 200)}
		done := make(chan struct{})
		go func() { keepConnected(ctx, srv, a); close(done) }()
		waitDurable(t, a)
		checkTarget(t, s.target, a.frames)
		if f := s.target.got[199]; f.Codec != frame.Zstd || f.StoredLen >= f.RawLen {
			t.Errorf("not compressed: %v, %d of %d bytes", f.Codec, f.StoredLen, f.RawLen)
		}
		st := srv.report().GetProcessServer().Streams[0]
		if !st.AgentConnected || !st.TargetConnected || st.BacklogBytes != 0 || st.FramesReceived != 200 || st.Durable.Seq != 200 || st.BytesSent >= st.BytesReceived {
			t.Errorf("status %v", st)
		}
		cancel()
		stop()
		<-done
	})
}

// Whatever breaks and restarts, and with power cuts of the process server: the
// master target ends with exactly what was sent.
func TestRestartsAndCrashes(t *testing.T) {
	for seed := range uint64(8) {
		synctest.Test(t, func(t *testing.T) {
			rng := &random{rng: rand.New(rand.NewPCG(seed, 9))}
			s := newSite(t)
			s.breakAt = func() int { return 1 + rng.IntN(300_000) }
			a := &agent{frames: frames(t, origin, 400)}
			for round := 0; a.durable() < 400; round++ {
				if round > 500 {
					t.Fatalf("no progress beyond %d", a.durable())
				}
				ctx, cancel := context.WithCancel(t.Context())
				srv, stop := s.start(ctx)
				done := make(chan struct{})
				go func() { keepConnected(ctx, srv, a); close(done) }()
				// Odd, so that everything else rests at that moment.
				time.Sleep(time.Duration(rng.IntN(400))*time.Millisecond + 137*time.Microsecond)
				if rng.IntN(2) == 0 {
					a.setDeaf(true)
					s.fs = s.fs.(*vfs.Mem).Crash(uint64(rng.IntN(1 << 40)))
				}
				cancel()
				stop()
				<-done
				a.setDeaf(false)
			}
			if a.lost != 0 {
				t.Errorf("change %d was stored, and asked for again", a.lost)
			}
			checkTarget(t, s.target, a.frames)
		})
	}
}

func TestSpoolBuffersAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		var cut, cutSoon atomic.Bool
		cutSoon.Store(true)
		s.cut = cut.Load
		s.breakAt = func() int {
			if cut.Load() || cutSoon.Load() {
				return 2000
			}
			return 1 << 40
		}
		ctx, cancel := context.WithCancel(t.Context())
		srv, stop := s.start(ctx)
		a := &agent{frames: frames(t, origin, 100)}
		done := make(chan struct{})
		time.Sleep(time.Second) // the spool learns where the stream stands
		cut.Store(true)
		go func() { keepConnected(ctx, srv, a); close(done) }()
		time.Sleep(time.Minute)
		a.mu.Lock()
		stored := a.ack.Stored
		a.mu.Unlock()
		st := srv.report().GetProcessServer().Streams[0]
		if stored != 100 || st.TargetConnected || st.BacklogBytes == 0 || st.Error == "" {
			t.Errorf("stored %d, status %v", stored, st)
		}
		cutSoon.Store(false)
		cut.Store(false)
		waitDurable(t, a)
		checkTarget(t, s.target, a.frames)
		cancel()
		stop()
		<-done
	})
}

// A spool whose history is not the master target's starts over there.
func TestForeignSpoolStartsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		first := &agent{frames: frames(t, origin, 50)}
		run := func(a *agent) {
			ctx, cancel := context.WithCancel(t.Context())
			srv, stop := s.start(ctx)
			done := make(chan struct{})
			go func() { keepConnected(ctx, srv, a); close(done) }()
			waitDurable(t, a)
			cancel()
			stop()
			<-done
		}
		run(first)
		other := origin
		other.Chain[0] = 9
		s.target = newTarget(frame.Cursor{Machine: machine, Position: dr.Position{Timeline: 1, Seq: 50}, Chain: [32]byte{7}, Time: 1 << 40})
		second := &agent{frames: frames(t, s.target.at, 20)}
		run(second)
		checkTarget(t, s.target, second.frames)
	})
}

func TestDeniesForeignStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		srv, stop := s.start(t.Context())
		defer stop()
		time.Sleep(time.Second)
		a := &agent{frames: frames(t, origin, 1)}
		for name, who := range map[string]transport.Peer{
			"another machine": {Role: transport.RoleAgent, Node: dr.NodeID{1}, Machine: dr.MachineID{9}},
			"another agent":   {Role: transport.RoleAgent, Node: dr.NodeID{8}, Machine: machine},
			"another role":    psPeer,
		} {
			if err := connect(t.Context(), srv, a, who); !errors.Is(err, dr.ErrDenied) {
				t.Errorf("%s: %v", name, err)
			}
		}
		srv.assign(t.Context(), &pb.ProcessServerAssignment{})
		if err := connect(t.Context(), srv, a, agentPeer); !errors.Is(err, dr.ErrNotFound) {
			t.Errorf("unassigned machine: %v", err)
		}
		if names, _ := s.fs.List("/spool"); len(names) != 0 {
			t.Errorf("spools left: %v", names)
		}
		if len(s.target.got) != 0 {
			t.Error("something was forwarded")
		}
	})
}

func TestDamagedSpoolIsSetAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		dir := "/spool/" + machine.String()
		if err := s.fs.MkdirAll(dir); err != nil {
			t.Fatal(err)
		}
		f, _ := s.fs.Create(dir + "/00000001-0000000000000001.seg")
		f.WriteAt(make([]byte, 4096), 0)
		srv, stop := s.start(t.Context())
		defer stop()
		r := srv.report()
		if len(r.Notices) != 1 || r.Notices[0].Code != "spool-damaged" || len(r.GetProcessServer().Streams) != 1 {
			t.Errorf("report %v", r)
		}
		if _, err := s.fs.Stat(dir + ".damaged"); err != nil {
			t.Error(err)
		}
	})
}

func TestConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	write := func(text string) (Config, error) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return LoadConfig(file)
	}
	c, err := write("data: /d\nlisten: 127.0.0.1:0\nspool_limit: 1GiB\n")
	if err != nil || c.Spool != filepath.Join("/d", "spool") || c.SpoolLimit != 1<<30 {
		t.Errorf("%+v %v", c, err)
	}
	for text, want := range map[string]string{
		"data: /d\nlisten: 127.0.0.1:0\nspol: x\n": "spol", "listen: a:1\n": "data", "data: /d\nlisten: nowhere\n": "listen",
		"data: /d\nlisten: a:1\nspool_limit: 1MiB\n": "spool_limit", "data: /d\nlisten: a:1\nspool_total: 1MiB\n": "spool_total", "data: /d\nlisten: :1\n": "advertise", "data: /d\nlisten: 0.0.0.0:1\n": "advertise", "data: /d\nlisten: '[::]:1'\n": "advertise",
		"data: /d\nlisten: a:1\nadvertise: b\n": "advertise", "data: /d\nlisten: a:1\nspool_limit: lots\n": "lots",
	} {
		if _, err := write(text); !errors.Is(err, dr.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	if _, err := LoadConfig(file + ".none"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if err := Run(t.Context(), Config{Data: t.TempDir(), Listen: "127.0.0.1:0", Spool: t.TempDir()}, slog.New(slog.DiscardHandler)); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("a node that has not joined: %v", err)
	}
}
