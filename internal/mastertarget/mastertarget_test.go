package mastertarget

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/export"
	"farside/internal/frame"
	"farside/internal/link"
	"farside/internal/nbd"
	"farside/internal/transport"
	"farside/internal/vault"
	"farside/internal/vfs"
)

var (
	machineID = dr.MachineID{1}
	writer    = transport.Peer{Role: transport.RoleProcessServer, Node: dr.NodeID{2}}
	self      = transport.Peer{Role: transport.RoleMasterTarget, Node: dr.NodeID{3}}
	diskSize  = int64(1 << 20)
)

// target is a master target in memory, with real sockets for its exports.
type target struct {
	t      *testing.T
	fs     *vfs.Mem
	server *server
	stop   func()
}

func start(t *testing.T, fsys *vfs.Mem) *target {
	t.Helper()
	exports, err := export.Listen(export.Options{Socket: filepath.Join(t.TempDir(), "s")})
	if err != nil {
		t.Fatal(err)
	}
	o := vault.Options{SegmentSize: 64 << 10, Cache: vault.NewCache(32 << 20)}
	s := newServer(fsys, "/vaults", o, time.Hour, exports, func() {}, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { s.run(ctx) })
	stopped := false
	x := &target{t: t, fs: fsys, server: s, stop: func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		wg.Wait()
		if err := exports.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}}
	t.Cleanup(x.stop)
	return x
}

func newFS(t *testing.T) *vfs.Mem {
	mem := vfs.NewMem()
	if err := errors.Join(mem.MkdirAll("/vaults"), mem.SyncDir("/")); err != nil {
		t.Fatal(err)
	}
	return mem
}

func assignment(views ...*pb.ViewAssignment) *pb.MasterTargetAssignment {
	return &pb.MasterTargetAssignment{
		Machines: []*pb.TargetMachine{{
			MachineId: machineID.String(), Timeline: 1, Writers: []string{writer.Node.String()},
			Disks: []*pb.Disk{{Id: 1, Path: "/dev/sda", Size: diskSize}},
		}},
		Views: views,
	}
}

// eventually waits until a report is as wanted.
func (x *target) eventually(what string, ok func(*pb.MasterTargetReport) bool) *pb.MasterTargetReport {
	x.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		r := x.server.report().GetMasterTarget()
		if ok(r) {
			return r
		}
		if time.Now().After(end) {
			x.t.Fatalf("%s did not happen: %v", what, r)
		}
	}
}

// feed is a link.Source of numbered writes.
type feed struct {
	mu   sync.Mutex
	enc  *frame.Encoder
	left int
	ack  link.Ack
	done chan struct{} // closed when all is durable
}

func newFeed(n int) *feed { return &feed{left: n, done: make(chan struct{})} }

func (f *feed) Resume(at frame.Cursor, _ dr.Seq) error {
	f.enc = frame.NewEncoder(at, frame.Zstd)
	return nil
}

// Next makes a frame of one write: sector n%2048 gets its sequence number.
func (f *feed) Next(ctx context.Context) ([]byte, error) {
	f.mu.Lock()
	if f.left > 0 {
		defer f.mu.Unlock()
		f.left--
		seq := f.enc.Cursor().Position.Seq + 1
		f.enc.Begin(frame.Changes, dr.Exact, false)
		x := dr.Extent{Disk: 1, Offset: int64(seq%2048) * 512, Length: 512}
		if _, err := f.enc.Add(x, dr.Data, int64(seq)*1e6, sector(seq)); err != nil {
			return nil, err
		}
		return f.enc.Finish()
	}
	f.mu.Unlock()
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

func (f *feed) Acked(a link.Ack) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ack = a
	if f.enc != nil && f.left == 0 && a.Durable == f.enc.Cursor().Position.Seq {
		select {
		case <-f.done:
		default:
			close(f.done)
		}
	}
}

func sector(seq dr.Seq) []byte { return bytes.Repeat([]byte{byte(seq), byte(seq >> 8)}, 256) }

// send streams n writes and waits until they are durable, or returns why not.
func (x *target) send(who transport.Peer, h link.Hello, n int) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	left, right := transport.Pipe(who, self)
	f := newFeed(n)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { x.server.links.Serve(ctx, right) })
	failed := make(chan error, 1)
	wg.Go(func() { failed <- link.Send(ctx, left, link.SenderOptions{Hello: h, Source: f}) })
	select {
	case <-f.done:
		cancel()
		return nil
	case err := <-failed:
		cancel()
		return err
	}
}

func hello() link.Hello { return link.Hello{Machine: machineID, Timeline: 1} }

func TestStreamAndViews(t *testing.T) {
	mem := newFS(t)
	x := start(t, mem)
	latest := &pb.ViewAssignment{ViewId: "v1", MachineId: machineID.String(), Selector: &pb.Selector{Point: &pb.Selector_Latest{Latest: true}}}
	early := &pb.ViewAssignment{
		ViewId: "v2", MachineId: machineID.String(), Writable: true, BranchTimeline: 7,
		Selector: &pb.Selector{Point: &pb.Selector_Position{Position: &pb.Position{Timeline: 1, Seq: 50}}},
	}
	x.server.assign(assignment(latest))
	x.eventually("refusal", func(r *pb.MasterTargetReport) bool {
		return len(r.GetViews()) == 1 && r.GetViews()[0].GetErrorKind() == "no-point"
	})
	if err := x.send(writer, hello(), 300); err != nil {
		t.Fatal(err)
	}
	x.server.assign(assignment(latest, early))
	r := x.eventually("opening", func(r *pb.MasterTargetReport) bool {
		return len(r.GetViews()) == 2 && r.GetViews()[0].GetState() == pb.ViewState_VIEW_STATE_OPEN &&
			r.GetViews()[1].GetState() == pb.ViewState_VIEW_STATE_OPEN
	})
	m, v2 := r.GetMachines()[0], r.GetViews()[1]
	if m.GetHead().GetSeq() != 300 || m.GetNewest().GetPosition().GetSeq() != 300 || len(m.GetSpans()) != 1 || m.GetFramesReceived() != 300 ||
		m.GetError() != "" || len(m.GetDisks()) != 1 {
		t.Errorf("machine %v", m)
	}
	if v2.GetTimeline() != 7 || v2.GetPosition().GetSeq() != 50 || v2.GetOpenMs() <= 0 {
		t.Errorf("view %v", v2)
	}
	x.expect(r.GetViews()[0], 200, sector(200))
	x.expect(v2, 50, sector(50))
	x.expect(v2, 51, make([]byte, 512))
	x.write(v2, 51, []byte("mine"))
	x.expect(v2, 51, []byte("mine"))

	// After a restart the branch has what was flushed, and the stream goes on.
	x.stop()
	x = start(t, mem)
	early.Resolved = &pb.Position{Timeline: 1, Seq: 50}
	x.server.assign(assignment(early))
	r = x.eventually("opening again", func(r *pb.MasterTargetReport) bool {
		return len(r.GetViews()) == 1 && r.GetViews()[0].GetState() == pb.ViewState_VIEW_STATE_OPEN
	})
	v2 = r.GetViews()[0]
	if v2.GetTimeline() != 7 || v2.GetPosition().GetSeq() != 50 || v2.GetBranchBytes() == 0 {
		t.Errorf("view after a restart %v", v2)
	}
	x.expect(v2, 51, []byte("mine"))
	x.expect(v2, 50, sector(50))
	if err := x.send(writer, hello(), 10); err != nil {
		t.Fatal(err)
	}
	x.server.assign(assignment())
	x.eventually("closing", func(r *pb.MasterTargetReport) bool { return len(r.GetViews()) == 0 })
	v := x.server.machine(machineID).vault
	x.eventually("discarding", func(*pb.MasterTargetReport) bool { return len(v.Branches()) == 0 })
	x.server.assign(&pb.MasterTargetAssignment{})
	x.eventually("letting go", func(r *pb.MasterTargetReport) bool { return len(r.GetMachines()) == 0 })
	x.stop() // the vault is closed a moment after it left the report
	rep, err := vault.Check(context.Background(), mem, "/vaults/"+machineID.String(), nil)
	if err != nil || rep.Findings != nil {
		t.Errorf("check: %v, %v", err, rep)
	}
}

func (x *target) dial(v *pb.ViewStatus) *nbd.Client {
	x.t.Helper()
	c, err := nbd.Dial(context.Background(), v.GetExports()[0].GetUris()[0], nil)
	if err != nil {
		x.t.Fatal(err)
	}
	return c
}

// expect reads a sector of a view over NBD, which begins with want.
func (x *target) expect(v *pb.ViewStatus, n int64, want []byte) {
	x.t.Helper()
	c := x.dial(v)
	defer c.Close()
	got := make([]byte, 512)
	if _, err := c.ReadAt(got, n*512); err != nil || !bytes.HasPrefix(got, want) {
		x.t.Errorf("view %s: sector %d begins with %x (%v), want %x", v.GetViewId(), n, got[:4], err, want[:4])
	}
}

func (x *target) write(v *pb.ViewStatus, n int64, text []byte) {
	x.t.Helper()
	c := x.dial(v)
	defer c.Close()
	p := make([]byte, 512)
	copy(p, text)
	if _, err := c.WriteFUA(p, n*512); err != nil {
		x.t.Error(err)
	}
}

func TestAuthorize(t *testing.T) {
	x := start(t, newFS(t))
	x.server.assign(assignment())
	x.eventually("opening", func(r *pb.MasterTargetReport) bool { return len(r.GetMachines()) == 1 })
	for name, tc := range map[string]struct {
		who  transport.Peer
		h    link.Hello
		want error
	}{
		"another process server": {transport.Peer{Role: transport.RoleProcessServer, Node: dr.NodeID{9}}, hello(), dr.ErrDenied},
		"an agent":               {transport.Peer{Role: transport.RoleAgent, Node: writer.Node, Machine: machineID}, hello(), dr.ErrDenied},
		"unknown machine":        {writer, link.Hello{Machine: dr.MachineID{8}, Timeline: 1}, dr.ErrNotFound},
		"another timeline":       {writer, link.Hello{Machine: machineID, Timeline: 2}, dr.ErrTimeline},
	} {
		t.Run(name, func(t *testing.T) {
			if err := x.send(tc.who, tc.h, 1); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
	retired := assignment()
	retired.Machines[0].Retired = true
	x.server.assign(retired)
	for end := time.Now().Add(10 * time.Second); !x.server.machine(machineID).wanted().retired && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if err := x.send(writer, hello(), 1); !errors.Is(err, dr.ErrDenied) {
		t.Errorf("retired machine: %v", err)
	}
}

// TestBadAssignments: what is not understood is left out, what fails is told.
func TestBadAssignments(t *testing.T) {
	x := start(t, newFS(t))
	a := assignment(
		&pb.ViewAssignment{ViewId: "a", MachineId: "nonsense"},
		&pb.ViewAssignment{ViewId: "b", MachineId: dr.MachineID{44}.String()},
	)
	a.Machines = append(a.Machines,
		&pb.TargetMachine{MachineId: "nonsense"},
		&pb.TargetMachine{MachineId: dr.MachineID{5}.String(), Writers: []string{"nonsense"}},
		&pb.TargetMachine{MachineId: dr.MachineID{6}.String(), Disks: []*pb.Disk{{Id: 1, Size: 1000}}},
		&pb.TargetMachine{MachineId: dr.MachineID{7}.String(), Disks: []*pb.Disk{{Id: 1 << 20, Size: 512}}},
	)
	broken := "/vaults/" + dr.MachineID{9}.String()
	if err := x.fs.MkdirAll(broken); err != nil {
		t.Fatal(err)
	}
	if f, err := x.fs.Create(broken + "/MANIFEST"); err != nil || f.Close() != nil {
		t.Fatal(err)
	}
	a.Machines = append(a.Machines, &pb.TargetMachine{MachineId: dr.MachineID{9}.String()})
	x.server.assign(a)
	r := x.eventually("all of it", func(r *pb.MasterTargetReport) bool { return len(r.GetMachines()) == 3 && len(r.GetViews()) == 1 })
	for _, m := range r.GetMachines() {
		if bad := m.GetMachineId() != machineID.String(); bad != (m.GetError() != "") {
			t.Errorf("machine %v", m)
		}
	}
	if v := r.GetViews()[0]; v.GetErrorKind() != "unavailable" {
		t.Errorf("view %v", v)
	}
}

func TestConfig(t *testing.T) {
	c, err := ParseConfig([]byte("data: /d\nlisten: 127.0.0.1:0\n"))
	want := Config{
		Data: "/d", Listen: "127.0.0.1:0", Vaults: "/d/vaults", Cache: defaultCache, History: 24 * time.Hour,
		NBD: NBDConfig{Socket: "/d/nbd.sock"},
	}
	if err != nil || c != want {
		t.Errorf("%+v, %v", c, err)
	}
	for name, text := range map[string]string{
		"empty": "", "no listen": "data: /d\n", "unknown key": "data: /d\nlisten: a:1\nlistne: b:1\n",
		"small cache": "data: /d\nlisten: a:1\ncache: 1MiB\n", "bad address": "data: /d\nlisten: nonsense\n",
		"bad nbd": "data: /d\nlisten: a:1\nnbd: {listen: x}\n", "negative history": "data: /d\nlisten: a:1\nhistory: -1h\n",
		"long socket": "data: /d\nlisten: a:1\nnbd: {socket: /" + strings.Repeat("x", 200) + "}\n",
	} {
		if _, err := ParseConfig([]byte(text)); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := LoadConfig(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a missing file was read")
	}
	if err := Run(t.Context(), Config{Data: t.TempDir()}, slog.New(slog.DiscardHandler)); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("run without having joined: %v", err)
	}
}
