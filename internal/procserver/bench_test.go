package procserver

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/link"
	"farside/internal/transport"
	"farside/internal/transport/transporttest"
	"farside/internal/vfs"
)

// hop is a listener on loopback over mutual TLS that serves each connection.
func hop(b *testing.B, id *transport.Identity, role string, serve func(net.Conn)) string {
	b.Helper()
	l, err := id.Listen("127.0.0.1:0", role)
	if err != nil {
		b.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serve(conn) })
		}
	})
	b.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

// mixed fills p with bytes of which about half compress away.
func mixed(rng *rand.ChaCha8, p []byte) {
	for i := 0; i+4096 <= len(p); i += 4096 {
		rng.Read(p[i : i+2048])
	}
}

// finite is a Source over n repetitions of the work of making no frame twice: it
// re-numbers nothing, so that frames are made beforehand.
type finite struct {
	frames [][]byte
	next   int
	last   dr.Seq
	done   context.CancelFunc
}

func (f *finite) Resume(frame.Cursor, dr.Seq) error { return nil }

func (f *finite) Next(ctx context.Context) ([]byte, error) {
	if f.next == len(f.frames) {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	f.next++
	return f.frames[f.next-1], nil
}

func (f *finite) Ready() bool { return f.next < len(f.frames) }

func (f *finite) Acked(a link.Ack) {
	if a.Durable == f.last {
		f.done()
	}
}

// void is a master target that keeps nothing.
type void struct {
	*target
}

func (v void) Append(_ context.Context, fs []*frame.Frame) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.at = fs[len(fs)-1].End()
	return nil
}

// BenchmarkForward is the way of frames over two hops of mutual TLS and a spool
// on the disk: bytes of payload until the far side has acknowledged all. Peer:
// the disk alone, written and synced in the same pieces.
func BenchmarkForward(b *testing.B) {
	const total = 128 << 20
	for _, size := range []int{4 << 10, 64 << 10, 1 << 20} {
		for name, fill := range map[string]func(*rand.ChaCha8, []byte){
			"incompressible": func(r *rand.ChaCha8, p []byte) { r.Read(p) }, "half": mixed,
		} {
			b.Run(fmt.Sprintf("%dKiB/%s", size>>10, name), func(b *testing.B) {
				rng := rand.NewChaCha8([32]byte{1})
				e := frame.NewEncoder(origin, frame.None)
				var all [][]byte
				data := make([]byte, size)
				for range total / size {
					fill(rng, data)
					e.Begin(frame.Changes, dr.Exact, false)
					if _, err := e.Add(dr.Extent{Length: int64(size)}, dr.Data, 0, data); err != nil {
						b.Fatal(err)
					}
					f, err := e.Finish()
					if err != nil {
						b.Fatal(err)
					}
					all = append(all, f)
				}
				b.SetBytes(total)
				for b.Loop() {
					benchForward(b, all, e.Cursor().Position.Seq)
				}
			})
		}
	}
	b.Run("disk", func(b *testing.B) {
		data := make([]byte, 1<<20)
		rand.NewChaCha8([32]byte{1}).Read(data)
		b.SetBytes(total)
		for b.Loop() {
			f, err := os.Create(filepath.Join(b.TempDir(), "x"))
			if err != nil {
				b.Fatal(err)
			}
			for i := range total >> 20 {
				f.Write(data)
				if i%8 == 7 {
					f.Sync()
				}
			}
			f.Close()
		}
	})
}

func benchForward(b *testing.B, all [][]byte, last dr.Seq) {
	b.Helper()
	b.StopTimer()
	site := transporttest.NewSite(b, nil)
	far, near := site.Identity(transport.RoleMasterTarget), site.Identity(transport.RoleProcessServer)
	agent := site.Issue(agentPeer, transport.NodeLifetime)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	sink := void{newTarget(origin)}
	farAddr := hop(b, far, transport.RoleProcessServer, func(c net.Conn) {
		link.Receive(ctx, c, func(context.Context, link.Hello) (link.Sink, error) { return sink, nil })
	})
	dir := b.TempDir()
	srv := newServer(vfs.OS(), dir, 1<<30, func(ctx context.Context, _ route) (net.Conn, error) {
		return near.Dial(ctx, farAddr, transport.RoleMasterTarget)
	}, slog.New(slog.DiscardHandler))
	nearAddr := hop(b, near, transport.RoleAgent, func(c net.Conn) { srv.links.Serve(ctx, c) })
	srv.assign(ctx, assignment())
	for !srv.stream(machine).isReady() {
	}
	src := &finite{frames: all, last: last, done: cancel}
	conn, err := agent.Dial(ctx, nearAddr, transport.RoleProcessServer)
	if err != nil {
		b.Fatal(err)
	}
	b.StartTimer()
	link.Send(ctx, conn, link.SenderOptions{Hello: link.Hello{Machine: machine, Timeline: 1}, Source: src})
	b.StopTimer()
	srv.close()
	b.StartTimer()
}
