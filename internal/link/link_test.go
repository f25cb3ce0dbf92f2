package link

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/transport"
)

var (
	machine = dr.MachineID{1, 2, 3}
	origin  = frame.Cursor{Machine: machine, Position: dr.Position{Timeline: 1}}
	hello   = Hello{Machine: machine, Timeline: 1}
)

// frames makes n frames that continue c.
func frames(t testing.TB, c frame.Cursor, n int) (out [][]byte) {
	t.Helper()
	e := frame.NewEncoder(c, frame.None)
	for i := range n {
		e.Begin(frame.Changes, dr.Exact, false)
		data := bytes.Repeat([]byte{byte(i)}, 512*(1+i%9))
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

// list is a Source over frames that all exist; at the end it waits.
type list struct {
	mu      sync.Mutex
	frames  [][]byte
	next    int
	acked   Ack
	done    chan struct{} // closed when the last frame is durable
	resumed []frame.Cursor
}

func newList(frames [][]byte) *list { return &list{frames: frames, done: make(chan struct{})} }

func (l *list) Resume(at frame.Cursor, _ dr.Seq) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.resumed = append(l.resumed, at)
	for i, b := range l.frames {
		if h, _ := frame.ParseHeader(b); h.Prev == at.Position.Seq {
			l.next = i
			return nil
		}
	}
	if h, _ := frame.ParseHeader(l.frames[len(l.frames)-1]); h.Last == at.Position.Seq {
		l.next = len(l.frames)
		return nil
	}
	return fmt.Errorf("resume at %v: %w", at.Position, dr.ErrGap)
}

func (l *list) Next(ctx context.Context) ([]byte, error) {
	l.mu.Lock()
	if l.next < len(l.frames) {
		defer l.mu.Unlock()
		l.next++
		return l.frames[l.next-1], nil
	}
	l.mu.Unlock()
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

func (l *list) Ready() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.next < len(l.frames)
}

func (l *list) Acked(a Ack) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.acked = a
	if h, _ := frame.ParseHeader(l.frames[len(l.frames)-1]); a.Durable == h.Last {
		select {
		case <-l.done:
		default:
			close(l.done)
		}
	}
}

// memSink keeps frames; what was not synced is lost by a crash.
type memSink struct {
	mu       sync.Mutex
	at       frame.Cursor
	got      [][]byte
	synced   int
	progress *Progress
	fail     error
	failSync error
}

func newMemSink() *memSink { return &memSink{at: origin, progress: NewProgress(Ack{})} }

func (s *memSink) Cursor() frame.Cursor { s.mu.Lock(); defer s.mu.Unlock(); return s.at }

func (s *memSink) Append(_ context.Context, fs []*frame.Frame) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range fs {
		if err := f.Check(s.at); err != nil {
			panic(err) // link must not hand over what does not continue
		}
		s.at = f.End()
		s.got = append(s.got, f.Bytes())
	}
	return s.fail
}

func (s *memSink) Sync() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failSync != nil {
		return s.failSync
	}
	s.synced = len(s.got)
	s.progress.Raise(s.at.Position.Seq, s.at.Position.Seq)
	return nil
}

func (s *memSink) Progress() *Progress { return s.progress }

// crash forgets what was not synced.
func (s *memSink) crash() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got = s.got[:s.synced]
	s.at = origin
	if s.synced > 0 {
		h, _ := frame.ParseHeader(s.got[s.synced-1])
		s.at = h.End()
	}
}

func (s *memSink) open(context.Context, Hello) (Sink, error) { return s, nil }

func pipe() (net.Conn, net.Conn) {
	return transport.Pipe(
		transport.Peer{Role: transport.RoleAgent, Node: dr.NodeID{1}, Machine: machine},
		transport.Peer{Role: transport.RoleProcessServer, Node: dr.NodeID{2}})
}

// session runs both sides until both end, and returns their errors.
func session(ctx context.Context, src Source, open Open, wrap func(net.Conn) net.Conn) (sendErr, receiveErr error) {
	a, b := pipe()
	if wrap != nil {
		a = wrap(a)
	}
	var wg sync.WaitGroup
	wg.Go(func() { sendErr = Send(ctx, a, SenderOptions{Hello: hello, Source: src, Window: 64 << 10}) })
	wg.Go(func() { receiveErr = Receive(ctx, b, open) })
	wg.Wait()
	return sendErr, receiveErr
}

func checkAll(t *testing.T, s *memSink, want [][]byte) {
	t.Helper()
	if len(s.got) != len(want) {
		t.Fatalf("%d frames arrived, want %d", len(s.got), len(want))
	}
	for i := range want {
		if !bytes.Equal(s.got[i], want[i]) {
			t.Fatalf("frame %d differs", i)
		}
	}
}

func TestStream(t *testing.T) {
	all := frames(t, origin, 500)
	src, sink := newList(all), newMemSink()
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-src.done; cancel() }()
	sendErr, receiveErr := session(ctx, src, sink.open, nil)
	if !errors.Is(sendErr, context.Canceled) && !errors.Is(receiveErr, context.Canceled) {
		t.Errorf("%v, %v", sendErr, receiveErr)
	}
	checkAll(t, sink, all)
}

// breaking is a connection that breaks after some bytes, or changes one.
type breaking struct {
	net.Conn
	after int // bytes written until it happens
	flip  bool
}

func (b *breaking) Write(p []byte) (int, error) {
	if b.after >= len(p) || b.after < 0 {
		b.after -= len(p)
		return b.Conn.Write(p)
	}
	at := b.after
	b.after = -1
	if b.flip {
		q := bytes.Clone(p)
		q[at] ^= 0x10
		return b.Conn.Write(q)
	}
	n, _ := b.Conn.Write(p[:at])
	b.Conn.Close()
	return n, net.ErrClosed
}

// However often connections break, bytes flip and the receiver loses what it
// has not synced: in the end it holds exactly what was sent.
func TestResumeAfterAnything(t *testing.T) {
	all := frames(t, origin, 300)
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 3))
		src, sink := newList(all), newMemSink()
		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-src.done; cancel() }()
		for n := 0; ctx.Err() == nil; n++ {
			if n > 2000 {
				t.Fatal("no progress")
			}
			flip := rng.IntN(2) == 0
			session(ctx, src, sink.open, func(c net.Conn) net.Conn {
				return &breaking{c, rng.IntN(200_000), flip}
			})
			if rng.IntN(2) == 0 {
				select {
				case <-src.done: // durable: a crash keeps it
				default:
				}
				sink.crash()
			}
		}
		checkAll(t, sink, all)
	}
}

func TestDamageIsRefusedAndNotApplied(t *testing.T) {
	all := frames(t, origin, 4)
	flipped := bytes.Clone(all[1])
	flipped[len(flipped)-3] ^= 1
	foreign := frames(t, frame.Cursor{Machine: dr.MachineID{9}, Position: dr.Position{Timeline: 1}}, 1)[0]
	old := frames(t, frame.Cursor{Machine: machine, Position: dr.Position{Timeline: 7, Seq: 1}}, 1)[0]
	cases := map[string]struct {
		second []byte
		want   error
	}{
		"flipped": {flipped, dr.ErrCorrupt}, "dropped": {all[2], dr.ErrGap},
		"foreign machine": {foreign, dr.ErrDenied}, "other timeline": {old, dr.ErrTimeline},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			sink := newMemSink()
			err := raw(t, sink, all[0], tc.second, all[1])
			if !errors.Is(err, tc.want) {
				t.Errorf("refused with %v, want %v", err, tc.want)
			}
			checkAll(t, sink, all[:1])
		})
	}
	t.Run("repeated", func(t *testing.T) {
		sink := newMemSink()
		if err := raw(t, sink, all[0], all[0], all[1], all[0]); err != nil {
			t.Error(err)
		}
		checkAll(t, sink, all[:2])
	})
}

// raw sends frames as they are and returns the refusal, or nil if all were taken.
func raw(t *testing.T, sink *memSink, bodies ...[]byte) (refused error) {
	t.Helper()
	a, b := pipe()
	ended := make(chan error)
	go func() { ended <- Receive(t.Context(), b, sink.open) }()
	a.Write(hello.encode())
	if typ, _, err := readMessage(a); err != nil || typ != msgWelcome {
		t.Fatalf("message %d, %v", typ, err)
	}
	for _, body := range bodies {
		a.Write(message(msgFrame, body))
	}
	last, _ := frame.ParseHeader(bodies[0])
	for _, body := range bodies {
		if h, err := frame.ParseHeader(body); err == nil && h.Last > last.Last {
			last = h
		}
	}
	for refused == nil {
		typ, body, err := readMessage(a)
		if err != nil {
			t.Fatal(err)
		}
		if typ == msgRefuse {
			refused, _ = parseRefuse(body)
		} else if ack, _ := parseAck(body); typ == msgAck && ack.Stored >= last.Last {
			break
		}
	}
	a.Close()
	<-ended
	return refused
}

func TestOpenRefuses(t *testing.T) {
	for _, tc := range []struct {
		err, want error
		final     bool
	}{
		{fmt.Errorf("not yours: %w", dr.ErrDenied), dr.ErrDenied, true},
		{dr.ErrTimeline, dr.ErrTimeline, true},
		{dr.ErrNotFound, dr.ErrNotFound, false},
		{errors.New("disk on fire"), dr.ErrUnavailable, false},
	} {
		src := newList(frames(t, origin, 1))
		sendErr, _ := session(t.Context(), src, func(context.Context, Hello) (Sink, error) { return nil, tc.err }, nil)
		r := (*Refused)(nil)
		if !errors.As(sendErr, &r) || !errors.Is(sendErr, tc.want) || IsFinal(sendErr) != tc.final {
			t.Errorf("open said %v, sender sees %v", tc.err, sendErr)
		}
	}
	src := newList(frames(t, frame.Cursor{Machine: machine, Position: dr.Position{Timeline: 1, Seq: 50}}, 2))
	if sendErr, _ := session(t.Context(), src, newMemSink().open, nil); !errors.Is(sendErr, dr.ErrGap) {
		t.Errorf("a source that can't continue: %v", sendErr)
	}
	failing := newMemSink()
	failing.fail = dr.ErrFull
	if sendErr, _ := session(t.Context(), newList(frames(t, origin, 1)), failing.open, nil); !errors.Is(sendErr, dr.ErrUnavailable) {
		t.Errorf("a sink that fails: %v", sendErr)
	}
}

func TestGarbage(t *testing.T) {
	for _, text := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x04\x00\x00\x00\xff\xff\xff\x7f", "\x01\x00\x00\x00\x20\x00\x00\x00" + "FSLK\x09\x00" + string(make([]byte, 26))} {
		a, b := pipe()
		ended := make(chan error, 1)
		go func() { ended <- Receive(t.Context(), b, newMemSink().open) }()
		a.Write([]byte(text))
		if typ, _, err := readMessage(a); err != nil || typ != msgRefuse {
			t.Errorf("%q: answered by message %d, %v", text, typ, err)
		}
		a.Close()
		if err := <-ended; !errors.Is(err, dr.ErrCorrupt) && !errors.Is(err, dr.ErrVersion) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestKeepAliveAndDeadPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := frames(t, origin, 1)
		src, sink := newList(all), newMemSink()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		if sendErr, receiveErr := session(ctx, src, sink.open, nil); !errors.Is(sendErr, context.DeadlineExceeded) || !errors.Is(receiveErr, context.DeadlineExceeded) {
			t.Errorf("an idle stream must live: %v, %v", sendErr, receiveErr)
		}
		a, b := pipe()
		defer a.Close()
		began := time.Now()
		err := Receive(t.Context(), b, newMemSink().open) // no one speaks at a
		if took := time.Since(began); err == nil || took < deadAfter || took > deadAfter+lingerFor+pingEvery {
			t.Errorf("silent peer: %v after %v", err, took)
		}
	})
}

func TestServerReplacesTheOldConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sink := newMemSink()
		denied := false
		srv := &Server{
			Authorize: func(conn net.Conn, h Hello) error {
				p, err := transport.PeerOf(conn)
				if err == nil && (p.Machine != h.Machine || denied) {
					err = dr.ErrDenied
				}
				return err
			},
			Open: sink.open,
		}
		all := frames(t, origin, 9)
		start := func(src Source) (result chan error) {
			result = make(chan error, 1)
			a, b := pipe()
			go srv.Serve(t.Context(), b)
			go func() { result <- Send(t.Context(), a, SenderOptions{Hello: hello, Source: src}) }()
			synctest.Wait()
			return result
		}
		first := start(newList(all))
		second := start(newList(all))
		if err := <-first; !errors.Is(err, net.ErrClosed) && err == nil {
			t.Error(err)
		}
		denied = true
		if err := <-start(newList(all)); !errors.Is(err, dr.ErrDenied) {
			t.Errorf("denied stream: %v", err)
		}
		if !srv.Connected(machine) {
			t.Error("a denied stream must not replace the old one")
		}
		srv.Drop(machine)
		if err := <-second; err == nil || srv.Connected(machine) {
			t.Errorf("dropped: %v", err)
		}
		checkAll(t, sink, all)
	})
}

func FuzzReadMessage(f *testing.F) {
	f.Add(hello.encode())
	f.Add(encodeWelcome(origin, 3))
	f.Add(Ack{1, 2}.encode())
	f.Add((&Refused{Code: CodeGap, Text: "gap"}).encode())
	f.Add(message(msgFrame, frames(f, origin, 1)[0]))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		s, rcv := sender{machine: machine}, receiver{at: origin}
		for {
			typ, body, err := readMessage(r)
			if err != nil {
				return
			}
			before := s.ack
			s.receive(typ, body)
			if s.ack.Stored < before.Stored || s.streaming && s.ack.Stored > s.at.Position.Seq {
				t.Fatalf("ack %+v", s.ack)
			}
			at := rcv.at
			if typ == msgFrame {
				if fr, err := rcv.take(body); fr != nil && (err != nil || fr.Check(at) != nil) {
					t.Fatal("took a frame that does not continue")
				}
			}
			parseHello(body)
		}
	})
}

func BenchmarkPipe(b *testing.B) {
	e := frame.NewEncoder(origin, frame.None)
	data := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	var all [][]byte
	for range 64 {
		e.Begin(frame.Changes, dr.Exact, false)
		e.Add(dr.Extent{Length: 1 << 20}, dr.Data, 0, data)
		f, _ := e.Finish()
		all = append(all, f)
	}
	b.SetBytes(64 << 20)
	for b.Loop() {
		src := newList(all)
		ctx, cancel := context.WithCancel(b.Context())
		go func() { <-src.done; cancel() }()
		session(ctx, src, newMemSink().open, nil)
	}
}
