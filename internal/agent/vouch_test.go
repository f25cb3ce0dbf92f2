package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/frame"
)

// marker is a Source without data: what changed is marked by the test, which also
// says what the Source vouches for.
type marker struct {
	capture.Source
	dirty *capture.Bitmap
	image []byte
	at    time.Time
	why   error
	asked int
}

func newMarker(t *testing.T) *marker {
	t.Helper()
	disks := []capture.Disk{{ID: 3, Size: 64 << 10}}
	b, err := capture.NewBitmap(disks, 4096, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &marker{Source: capturetest.NewMem(disks...), dirty: b, image: make([]byte, disks[0].Size), why: errNotYet}
}

var errNotYet = fmt.Errorf("no pass yet: %w", dr.ErrUnavailable)

func (m *marker) write(t *testing.T, off int64, v byte) {
	t.Helper()
	copy(m.image[off:], bytes.Repeat([]byte{v}, 4096))
	if err := m.dirty.Mark(dr.Extent{Disk: 3, Offset: off, Length: 4096}); err != nil {
		t.Fatal(err)
	}
}

func (m *marker) Mark(x dr.Extent) error                     { return m.dirty.Mark(x) }
func (m *marker) TakeDirty(limit int64) ([]dr.Extent, error) { return m.dirty.Take(limit), nil }
func (m *marker) Dirty() (int64, error)                      { return m.dirty.Dirty(), nil }
func (m *marker) Stats() capture.Stats                       { return capture.Stats{Mode: capture.ModeBitmap} }

func (m *marker) Resume(context.Context) error              { return fmt.Errorf("resume: %w", dr.ErrUnsupported) }
func (m *marker) Overflow()                                 {}
func (m *marker) Verify(context.Context) (time.Time, error) { m.asked++; return m.at, m.why }
func (m *marker) ReadAt(p []byte, _ dr.DiskID, o int64) (int, error) {
	return copy(p, m.image[o:]), nil
}

// pipe is a replicator with a far side that counts points.
type pipe struct {
	t      *testing.T
	out    *outbox
	rep    *replicator
	now    time.Time
	at     frame.Cursor
	image  []byte
	points []int64 // times of heartbeats
	tags   []string
}

func newPipe(t *testing.T, src capture.Source) *pipe {
	t.Helper()
	tune := defaultTuning()
	tune.wait = 0
	p := &pipe{t: t, out: newOutbox(), now: time.Unix(1_000_000, 0), image: make([]byte, src.Disks()[0].Size)}
	p.rep = newReplicator(src, p.out, tune)
	p.at = frame.Cursor{Machine: dr.MachineID{7}, Position: dr.Position{Timeline: 1}}
	p.out.resume(p.at, 0, ReasonInitial)
	return p
}

// run steps n times and carries every frame to the far side.
func (p *pipe) run(n int) error {
	p.t.Helper()
	for range n {
		p.now = p.now.Add(10 * time.Millisecond)
		if _, err := p.rep.step(p.t.Context(), p.now, 0); err != nil {
			return err
		}
		for b, _ := p.out.take(); b != nil; b, _ = p.out.take() {
			p.apply(b)
		}
		p.out.acked(p.at.Position.Seq, p.at.Position.Seq, p.now)
	}
	return nil
}

func (p *pipe) apply(b []byte) {
	p.t.Helper()
	f, err := frame.Parse(bytes.Clone(b))
	if err != nil {
		p.t.Fatal(err)
	}
	if err := f.Check(p.at); err != nil {
		p.t.Fatal(err)
	}
	payload, err := f.Payload(nil)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, x := range f.All() {
		dst := p.image[x.Offset:x.End()]
		if clear(dst); x.What == dr.Data {
			copy(dst, payload[x.RawOff:])
		}
		if !f.Open {
			p.t.Errorf("extent %v in a frame that offers points", x)
		}
	}
	p.at = f.End()
	switch f.Kind {
	case frame.Heartbeat:
		p.points = append(p.points, f.LastTime)
	case frame.TagKind:
		tag, err := f.Tag()
		if err != nil {
			p.t.Fatal(err)
		}
		p.tags = append(p.tags, tag.Name)
	}
}

func (p *pipe) step(n int) {
	p.t.Helper()
	if err := p.run(n); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pipe) pointsAre(want ...time.Time) {
	p.t.Helper()
	if len(p.points) != len(want) {
		p.t.Fatalf("%d points, want %d: %v", len(p.points), len(want), p.points)
	}
	for i, w := range want {
		if p.points[i] != w.UnixNano() {
			p.t.Errorf("point %d at %d, want %d", i, p.points[i], w.UnixNano())
		}
	}
}

// A source that only marks gets one point for each moment that it vouches for,
// and the stream stays open between them.
func TestDatalessPoints(t *testing.T) {
	src := newMarker(t)
	src.write(t, 8192, 1)
	p := newPipe(t, src)
	p.step(30)
	p.pointsAre()
	if !bytes.Equal(p.image, src.image) || src.asked == 0 {
		t.Fatalf("not copied, or not asked (%d)", src.asked)
	}
	if p.rep.patience() != p.rep.tune.wait || !p.rep.sync.idle {
		t.Error("busy while the source can't vouch")
	}

	first := p.now
	src.at, src.why = first, nil
	p.rep.tags.ask(dr.Tag{ID: [16]byte{1}, Consistency: dr.Crash, Name: "late"})
	p.step(20)
	p.pointsAre(first)
	if st := p.rep.status(); st.phase != Syncing || st.why != ReasonScan {
		t.Errorf("%v, %v", st.phase, st.why)
	}
	if age, ok := p.out.delivery(p.now, false).rpo, p.out.delivery(p.now, false).rpoKnown; !ok || age != p.now.Sub(first) {
		t.Errorf("RPO %v, %v; want the age of the point, %v", age, ok, p.now.Sub(first))
	}

	src.write(t, 0, 2)
	src.why = fmt.Errorf("it changes all the time: %w", dr.ErrNoPoint)
	p.step(20)
	p.pointsAre(first)
	if len(p.tags) != 0 {
		t.Errorf("tags %v without a point behind their request", p.tags)
	}
	second := p.now
	src.at, src.why = second, nil
	p.step(20)
	p.pointsAre(first, second)
	if !bytes.Equal(p.image, src.image) || len(p.tags) != 1 {
		t.Errorf("differs, or tags are %v", p.tags)
	}
}

func TestNoPointIsNoticed(t *testing.T) {
	src := newMarker(t)
	p := newPipe(t, src)
	p.step(5)
	before := p.rep.status()
	src.why = fmt.Errorf("it changes all the time: %w", dr.ErrNoPoint)
	p.step(5)
	after := p.rep.status()
	notices := steps(&before, &after, p.now)
	if len(notices) != 1 || notices[0].code != "no-point" {
		t.Errorf("notices: %+v", notices)
	}
	src.why = errors.New("gone")
	if err := p.run(5); !errors.Is(err, src.why) {
		t.Errorf("the source failed, the replicator says %v", err)
	}
}

// verified is a Source with data that must be asked too.
type verified struct {
	*capturetest.Mem
	why error
}

func (v *verified) Verify(context.Context) (time.Time, error) { return time.Time{}, v.why }

func TestVerifierHoldsThePoint(t *testing.T) {
	src := &verified{capturetest.NewMem(capture.Disk{ID: 3, Size: 64 << 10}), errNotYet}
	p := newPipe(t, src)
	p.step(30)
	if p.pointsAre(); p.rep.phase != Syncing {
		t.Errorf("%v although the source can't vouch", p.rep.phase)
	}
	src.why = nil
	p.step(5)
	if p.rep.phase != Exact || len(p.points) != 1 {
		t.Errorf("%v, %d points", p.rep.phase, len(p.points))
	}
}
