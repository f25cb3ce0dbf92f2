package agent

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/link"
	"farside/internal/transport"
)

// fakeServer is a process server in memory: it applies frames to images, stores
// at once, and lets what it stored become durable a little later.
type fakeServer struct {
	t        *testing.T
	wg       sync.WaitGroup
	progress *link.Progress
	mu       struct {
		sync.Mutex
		at      frame.Cursor
		disks   map[dr.DiskID][]byte
		kinds   map[frame.Kind]int
		exact   bool // the newest frame was not open
		resyncs int  // times that the stream became open
		conns   []net.Conn
		dials   int
		refuse  error
		down    bool
		tags    []taggedImage
	}
}

// taggedImage is a tag with what the disks held there.
type taggedImage struct {
	dr.Tag
	disks map[dr.DiskID][]byte
}

func (f *fakeServer) noteTagLocked(fr *frame.Frame) error {
	if fr.Kind != frame.TagKind {
		return nil
	}
	tag, err := fr.Tag()
	if err != nil {
		return err
	}
	if fr.Open {
		f.t.Errorf("tag %q where no point is", tag.Name)
	}
	f.mu.tags = append(f.mu.tags, taggedImage{tag, cloneDisks(f.mu.disks)})
	return nil
}

// tagged returns the tags that came.
func (f *fakeServer) tagged() []taggedImage {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.mu.tags)
}

func newFakeServer(t *testing.T, machine dr.MachineID, disks []capture.Disk) *fakeServer {
	f := &fakeServer{t: t, progress: link.NewProgress(link.Ack{})}
	f.mu.at = frame.Cursor{Machine: machine, Position: dr.Position{Timeline: 1}}
	f.mu.disks, f.mu.kinds, f.mu.exact = map[dr.DiskID][]byte{}, map[frame.Kind]int{}, true
	for _, d := range disks {
		f.mu.disks[d.ID] = make([]byte, d.Size)
	}
	return f
}

// dial is a dialer.
func (f *fakeServer) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.dials++
	if f.mu.down {
		return nil, fmt.Errorf("dial: %w", dr.ErrUnavailable)
	}
	here, there := transport.Pipe(transport.Peer{Role: transport.RoleAgent}, transport.Peer{Role: transport.RoleProcessServer})
	f.mu.conns = append(f.mu.conns, there)
	f.wg.Go(func() {
		link.Receive(context.WithoutCancel(ctx), there, func(context.Context, link.Hello) (link.Sink, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f, f.mu.refuse
		})
	})
	return here, nil
}

// hangUp breaks all connections.
func (f *fakeServer) hangUp() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.mu.conns {
		c.Close()
	}
	f.mu.conns = nil
}

func (f *fakeServer) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// Cursor implements link.Sink.
func (f *fakeServer) Cursor() frame.Cursor {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.at
}

// Append implements link.Sink.
func (f *fakeServer) Append(_ context.Context, frames []*frame.Frame) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, fr := range frames {
		if err := fr.VerifyChain(f.mu.at.Chain); err != nil {
			f.t.Errorf("chain: %v", err)
		}
		raw, err := fr.Payload(nil)
		if err != nil {
			return err
		}
		for _, x := range fr.All() {
			dst := f.mu.disks[x.Disk][x.Offset:x.End()]
			if clear(dst); x.What == dr.Data {
				copy(dst, raw[x.RawOff:])
			}
		}
		if fr.Open && f.mu.exact {
			f.mu.resyncs++
		}
		f.mu.at, f.mu.exact = fr.End(), !fr.Open
		f.mu.kinds[fr.Kind]++
		if err := f.noteTagLocked(fr); err != nil {
			return err
		}
	}
	return nil
}

// Sync implements link.Sink.
func (f *fakeServer) Sync() error {
	seq := f.Cursor().Position.Seq
	time.Sleep(3 * time.Millisecond)
	f.progress.Raise(seq, 0)
	f.wg.Go(func() {
		time.Sleep(20 * time.Millisecond)
		f.progress.Raise(seq, seq)
	})
	return nil
}

// Progress implements link.Sink.
func (f *fakeServer) Progress() *link.Progress { return f.progress }

func (f *fakeServer) same(mem interface{ Image(dr.DiskID) []byte }) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, b := range f.mu.disks {
		if !bytes.Equal(b, mem.Image(id)) {
			return false
		}
	}
	return true
}
