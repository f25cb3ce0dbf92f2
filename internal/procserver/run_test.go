package procserver

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/link"
	"farside/internal/transport"
	"farside/internal/transport/transporttest"
)

// joined makes a data directory as joining and a first assignment do.
func joined(t *testing.T, id *transport.Identity, a *pb.Assignment) string {
	t.Helper()
	dir := t.TempDir()
	a.NodeId, a.ConfigServers = id.Peer().Node.String(), []string{"127.0.0.1:1"}
	text, err := protojson.Marshal(a)
	if err = errors.Join(err, id.Save(dir), transport.WriteFile(filepath.Join(dir, "assignment.json"), text)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// freeAddr returns an address of loopback that nobody listens at.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// A process server works by the assignment that it kept, without any
// configuration server: over TLS, from an agent to a master target.
func TestRunByTheKeptAssignment(t *testing.T) {
	site := transporttest.NewSite(t, nil)
	near, far := site.Identity(transport.RoleProcessServer), site.Identity(transport.RoleMasterTarget)
	sink := newTarget(origin)
	l, err := far.Listen("127.0.0.1:0", transport.RoleProcessServer)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		conn, err := l.Accept()
		if err == nil {
			link.Receive(ctx, conn, func(context.Context, link.Hello) (link.Sink, error) { return sink, nil })
		}
	})
	work := assignment()
	work.Streams[0].MasterTarget = &pb.Peer{NodeId: far.Peer().Node.String(), Addresses: []string{freeAddr(t), l.Addr().String()}}
	cfg := Config{Listen: freeAddr(t), Spool: filepath.Join(t.TempDir(), "spool"), SpoolLimit: defaultSpoolLimit}
	cfg.Data = joined(t, near, &pb.Assignment{Revision: 1, Work: &pb.Assignment_ProcessServer{ProcessServer: work}})
	wg.Go(func() {
		if err := Run(ctx, cfg, slog.New(slog.DiscardHandler)); err != nil {
			t.Error(err)
		}
	})

	a := &agent{frames: frames(t, origin, 50)}
	wg.Go(func() {
		id := site.Issue(agentPeer, time.Hour)
		for ctx.Err() == nil {
			conn, err := id.Dial(ctx, cfg.Listen, transport.RoleProcessServer)
			if err == nil {
				link.Send(ctx, conn, link.SenderOptions{Hello: link.Hello{Machine: machine, Timeline: 1}, Source: a})
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	waitDurable(t, a)
	cancel()
	l.Close()
	wg.Wait()
	checkTarget(t, sink, a.frames)
}

func TestRunRefuses(t *testing.T) {
	site := transporttest.NewSite(t, nil)
	log := slog.New(slog.DiscardHandler)
	agentDir := joined(t, site.Identity(transport.RoleAgent), &pb.Assignment{})
	if err := Run(t.Context(), Config{Data: agentDir, Listen: "127.0.0.1:0"}, log); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("an agent's identity: %v", err)
	}
	dir := joined(t, site.Identity(transport.RoleProcessServer), &pb.Assignment{})
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if err := Run(t.Context(), Config{Data: dir, Listen: taken.Addr().String(), Spool: t.TempDir()}, log); err == nil {
		t.Error("runs on an address that is taken")
	}
}

// What is strange in an assignment concerns only its own stream.
func TestAssignmentWithAStrangeStream(t *testing.T) {
	s := newSite(t)
	a := assignment()
	a.Streams = append(a.Streams, &pb.Stream{MachineId: "no id"}, &pb.Stream{
		MachineId: dr.NewMachineID().String(), AgentNodeId: dr.NewNodeID().String(), Timeline: 1, Codec: pb.Codec_CODEC_NONE,
	})
	srv := newServer(s.fs, "/spool", s.limit, s.dial, slog.New(slog.DiscardHandler))
	defer srv.close()
	srv.assign(t.Context(), a)
	if n := len(srv.report().GetProcessServer().Streams); n != 2 {
		t.Errorf("%d streams", n)
	}
	for codec, want := range map[pb.Codec]frame.Codec{
		pb.Codec_CODEC_UNSPECIFIED: frame.Zstd, pb.Codec_CODEC_NONE: frame.None, pb.Codec_CODEC_S2: frame.S2, pb.Codec_CODEC_ZSTD: frame.Zstd,
	} {
		a.Streams[0].Codec = codec
		if r, err := routeOf(a.Streams[0]); err != nil || r.codec != want {
			t.Errorf("%v: %v %v", codec, r.codec, err)
		}
	}
}
