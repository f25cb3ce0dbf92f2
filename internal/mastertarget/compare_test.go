package mastertarget

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/compare"
	"farside/internal/dr"
	"farside/internal/link"
	"farside/internal/transport"
)

// connect streams n writes, waits until they are durable, and returns how to call the
// master target; the link stays up.
func (x *target) connect(n int) *link.Caller {
	x.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	left, right := transport.Pipe(writer, self)
	f := newFeed(n)
	var wg sync.WaitGroup
	x.t.Cleanup(func() { cancel(); wg.Wait() })
	wg.Go(func() { x.server.links.Serve(ctx, right) })
	caller := make(chan *link.Caller, 1)
	wg.Go(func() {
		link.Send(ctx, left, link.SenderOptions{Hello: hello(), Source: f, Connected: func(c *link.Caller) { caller <- c }})
	})
	select {
	case <-f.done:
	case <-time.After(20 * time.Second):
		x.t.Fatal("the writes did not become durable")
	}
	return <-caller
}

// content returns what disk 1 holds after n writes of a feed.
func content(n int) []byte {
	b := make([]byte, diskSize)
	for seq := 1; seq <= n; seq++ {
		copy(b[seq%2048*512:], sector(dr.Seq(seq)))
	}
	return b
}

// request asks about local, blocks of 1<<shift from block first on; skip says what is left out.
func request(local []byte, shift uint8, first, length int64, floor dr.Seq, skip func(i int) bool) *compare.Request {
	r := &compare.Request{
		Disk: 1, Shift: shift, Floor: dr.Position{Timeline: 1, Seq: floor}, First: first, Length: length, Key: compare.Key{9},
	}
	h := compare.NewHasher(r.Key)
	for i := range r.Blocks() {
		x := r.Block(i)
		switch b := local[x.Offset:x.End()]; {
		case skip(i):
			r.Add(compare.Skip, compare.Sum{})
		case compare.IsZero(b):
			r.Add(compare.Zero, compare.Sum{})
		default:
			r.Add(compare.Data, h.Sum(b))
		}
	}
	return r
}

func ask(t *testing.T, c *link.Caller, r *compare.Request) (*compare.Answer, error) {
	t.Helper()
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if b, err = c.Call(t.Context(), link.CallCompare, b); err != nil {
		return nil, err
	}
	return compare.ParseAnswer(r, b)
}

func none(int) bool { return false }

// Whatever differs is found, and nothing else, while the vault folds its past.
func TestCompareFindsDifferences(t *testing.T) {
	x := start(t, newFS(t))
	x.server.assign(assignment())
	x.eventually("machine", func(r *pb.MasterTargetReport) bool { return len(r.GetMachines()) == 1 })
	const writes = 700
	c := x.connect(writes)
	m := x.server.machine(machineID)
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range 200 {
		if round%50 == 25 { // the past goes to the base meanwhile
			if _, err := m.vault.FoldTo(t.Context(), int64(round)*3*1e6); err != nil {
				t.Fatal(err)
			}
		}
		local := content(writes)
		for range rng.IntN(4) {
			off := rng.Int64N(diskSize)
			local[off]++
		}
		if rng.IntN(4) == 0 { // zero here, data there
			off := rng.Int64N(diskSize/2) &^ 4095
			clear(local[off : off+4096*rng.Int64N(20)])
		}
		shift := compare.MinShift + uint8(rng.IntN(6))
		first := rng.Int64N(diskSize >> shift)
		length := (1 + rng.Int64N((diskSize-first<<shift)/512)) * 512
		skipped := rng.IntN(64)
		skip := func(i int) bool { return skipped < 8 && i%8 == skipped }
		r := request(local, shift, first, length, dr.Seq(rng.IntN(writes+1)), skip)
		a, err := ask(t, c, r)
		if err != nil {
			t.Fatal(err)
		}
		there := content(writes)
		for i := range r.Blocks() {
			b := r.Block(i)
			want := string(local[b.Offset:b.End()]) != string(there[b.Offset:b.End()]) && !skip(i)
			if a.Differs(i) != want {
				t.Fatalf("round %d: block %d (%v, kind %d) differs: %t, want %t", round, i, b, r.Kinds[i], a.Differs(i), want)
			}
		}
		if a.At != (dr.Position{Timeline: 1, Seq: writes}) {
			t.Fatalf("answered for %v", a.At)
		}
	}
}

// What can't be answered is refused with a kind that the caller can act on.
func TestCompareRefuses(t *testing.T) {
	x := start(t, newFS(t))
	x.server.assign(assignment())
	x.eventually("machine", func(r *pb.MasterTargetReport) bool { return len(r.GetMachines()) == 1 })
	c := x.connect(10)
	local := content(10)
	good := func() *compare.Request { return request(local, 16, 0, diskSize, 10, none) }
	for name, q := range map[string]struct {
		want   error
		change func(*compare.Request)
	}{
		"a position to come": {dr.ErrUnavailable, func(r *compare.Request) { r.Floor.Seq = 11 }},
		"another timeline":   {dr.ErrTimeline, func(r *compare.Request) { r.Floor.Timeline = 2 }},
		"no such disk":       {dr.ErrNotFound, func(r *compare.Request) { r.Disk = 2 }},
		"beyond the end":     {dr.ErrInvalid, func(r *compare.Request) { r.First = 1 }},
	} {
		r := good()
		q.change(r)
		if _, err := ask(t, c, r); !errors.Is(err, q.want) {
			t.Errorf("%s: %v, want %v", name, err, q.want)
		}
	}
	if _, err := c.Call(t.Context(), link.CallCompare, []byte("nonsense")); !errors.Is(err, dr.ErrCorrupt) {
		t.Errorf("nonsense: %v", err)
	}
	if _, err := c.Call(t.Context(), link.CallBarrier, nil); !errors.Is(err, dr.ErrUnsupported) {
		t.Errorf("barrier: %v", err)
	}
	if a, err := ask(t, c, good()); err != nil || a.Any() {
		t.Errorf("afterwards: %v, %v", a, err)
	}
}

// A vault closes while it is compared: each call is answered or fails, and closing
// waits for it.
func TestCompareWhileClosing(t *testing.T) {
	x := start(t, newFS(t))
	x.server.assign(assignment())
	x.eventually("machine", func(r *pb.MasterTargetReport) bool { return len(r.GetMachines()) == 1 })
	c := x.connect(300)
	r := request(content(300), 12, 0, diskSize, 300, none)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				a, err := ask(t, c, r)
				if err != nil {
					if !errors.Is(err, dr.ErrUnavailable) {
						t.Errorf("at the end: %v", err)
					}
					return
				}
				if a.Any() {
					t.Error("something differs")
				}
			}
		})
	}
	time.Sleep(50 * time.Millisecond)
	x.stop()
	wg.Wait()
}

// Nothing is hashed beyond the bound, whoever asks.
func TestCompareIsBounded(t *testing.T) {
	x := start(t, newFS(t))
	x.server.assign(assignment())
	x.eventually("machine", func(r *pb.MasterTargetReport) bool { return len(r.GetMachines()) == 1 })
	c := x.connect(2047)
	room := cap(x.server.hash)
	for range room {
		x.server.hash <- struct{}{}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	b, err := request(content(2047), 16, 0, diskSize, 1, none).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Call(ctx, link.CallCompare, b); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with all places taken: %v", err)
	}
	for range room {
		<-x.server.hash
	}
	if a, err := ask(t, c, request(content(2047), 16, 0, diskSize, 1, none)); err != nil || a.Any() {
		t.Errorf("afterwards: %v, %v", a, err)
	}
}
