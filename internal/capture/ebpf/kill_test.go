//go:build linux && amd64

package ebpf

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
)

// childTask is what a child process is told by its environment: open the sets of
// disks in turn, the last one for ever, or all of them again and again.
type childTask struct {
	Sets    [][]capture.Disk
	Options Options
	Again   bool
	Release bool // what was handed over
}

const childVariable = "FARSIDE_CAPTURE_CHILD"

func TestMain(m *testing.M) {
	if text := os.Getenv(childVariable); text != "" {
		if err := child(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(text string) error {
	var task childTask
	if err := json.Unmarshal([]byte(text), &task); err != nil {
		return err
	}
	for i := 0; ; i++ {
		s, err := openSurvivor(task.Sets[i%len(task.Sets)], task.Options)
		if err != nil {
			return err
		}
		fmt.Println("open")
		last := !task.Again && i == len(task.Sets)-1
		if !last {
			if err := s.Close(); err != nil {
				return err
			}
		}
		for last {
			if _, err := s.Next(context.Background(), time.Second, func(capture.Event) error { return nil }); err != nil {
				return err
			}
			if task.Release {
				s.Release(s.Position())
			}
		}
	}
}

// startChild starts a process and waits until it has opened its disks once.
func startChild(t *testing.T, task childTask) (kill func()) {
	t.Helper()
	text, err := json.Marshal(task)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childVariable+"="+string(text))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill = sync.OnceFunc(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	t.Cleanup(kill)
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatal("the child does not open its disks")
	}
	go func() {
		for lines.Scan() { // or it blocks
		}
	}()
	return kill
}

// bench is some loop devices with the process of the test as their writer.
type bench struct {
	pins  string
	disks []capture.Disk
	devs  []*blockDevice
}

func newBench(t *testing.T, sizes ...int64) *bench {
	b := &bench{pins: newPins(t)}
	for i, size := range sizes {
		loop := newLoop(t, size)
		b.disks = append(b.disks, capture.Disk{ID: dr.DiskID(i + 1), Path: loop, Size: size})
		b.devs = append(b.devs, openBlock(t, loop))
	}
	return b
}

func (b *bench) open(t *testing.T, o Options, disks ...capture.Disk) capture.Survivor {
	t.Helper()
	s, err := openSurvivor(disks, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Forget(); s.Close() })
	return s
}

// exact opens all disks and makes a copy of them that is exact.
func (b *bench) exact(t *testing.T, o Options) (capture.Survivor, *capturetest.Replicator) {
	t.Helper()
	s := b.open(t, o, b.disks...)
	r := capturetest.NewReplicator(s)
	if err := r.MarkAll(); err != nil {
		t.Fatal(err)
	}
	closeExact(t, r)
	s.Release(s.Position())
	return s, r
}

// load writes n random blocks over all disks, one after the other, which oracle notes.
func (b *bench) load(t *testing.T, rng *rand.Rand, n int, oracle *capturetest.Oracle) {
	t.Helper()
	for range n {
		i := rng.IntN(len(b.disks))
		x := dr.Extent{Disk: b.disks[i].ID, Offset: rng.Int64N(b.disks[i].Size/4096) * 4096, Length: 4096}
		data := capturetest.Pattern(rng.Uint64(), x.Length)
		oracle.Record(x, data)
		if _, err := b.devs[i].WriteAt(data, x.Offset); err != nil {
			t.Fatal(err)
		}
	}
}

func (b *bench) oracle(t *testing.T, s capture.Source) *capturetest.Oracle {
	t.Helper()
	images := map[dr.DiskID][]byte{}
	for _, d := range s.Disks() {
		images[d.ID] = make([]byte, d.Size)
		if err := capturetest.ReadFull(s, images[d.ID], d.ID, 0); err != nil {
			t.Fatal(err)
		}
	}
	return capturetest.NewOracle(images)
}

// TestKill kills a process that captures under load, and another one goes on: every record,
// in order, and the copy is exact at each of them.
func TestKill(t *testing.T) {
	b := newBench(t, 8<<20, 4<<20)
	o := Options{RingBytes: 64 << 20, Pin: b.pins, Hold: true, Memory: 4096}
	s, r := b.exact(t, o)
	oracle := b.oracle(t, s)
	at := s.Position()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for round := range 3 { // the child adopts, reads, and is killed
		kill := startChild(t, childTask{Sets: [][]capture.Disk{b.disks}, Options: o})
		b.load(t, rng, 500, oracle)
		time.AfterFunc(time.Duration(rng.Int64N(int64(20*time.Millisecond))), kill)
		b.load(t, rng, 1000, oracle)
		kill()
		b.load(t, rng, 300, oracle) // nobody is there
		t.Logf("round %d: killed", round)
	}
	s = b.open(t, o, b.disks...)
	if !s.Adopted() || s.Position() != at {
		t.Fatalf("adopted %v at %d, want %d", s.Adopted(), s.Position(), at)
	}
	r.Adopt(s)
	r.OnExact = oracle.Event
	capturedUpTo(t, r, s)
	if n := oracle.Due(); n != 0 || !r.Exact() || r.Losts() != 0 {
		t.Errorf("%d writes are missing, exact %v, %+v", n, r.Exact(), s.Stats())
	}
	mustEqual(t, r)
	if d := s.Stats(); d.Disks[0].SeenBytes != d.Disks[0].KernelBytes || d.Disks[1].SeenBytes != d.Disks[1].KernelBytes || d.Detached {
		t.Errorf("accounting after the kills: %+v", d)
	}
}

// floor returns what has been released of what is pinned.
func floor(t *testing.T, pins string) (pos uint64) {
	t.Helper()
	editNotes(t, filepath.Join(pins, pinLive), func(n *notes) { pos = atomic.LoadUint64(&n.Floor) })
	return pos
}

// TestKillReleased: what a killed process released is gone, all else is there.
func TestKillReleased(t *testing.T) {
	b := newBench(t, 8<<20)
	o := Options{RingBytes: 1 << 20, Pin: b.pins, Hold: true}
	s, _ := b.exact(t, o)
	oracle := b.oracle(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(2, 1))
	kill := startChild(t, childTask{Sets: [][]capture.Disk{b.disks}, Options: o, Release: true})
	for want := floor(t, b.pins); oracle.Due() < 1000; { // many times the ring
		b.load(t, rng, 50, oracle)
		want += 50 * 4128
		for begin := time.Now(); floor(t, b.pins) < want; time.Sleep(time.Millisecond) {
			if time.Since(begin) > 30*time.Second {
				t.Fatalf("released to %d, want %d", floor(t, b.pins), want)
			}
		}
	}
	kill()
	b.load(t, rng, 100, oracle)
	s = b.open(t, o, b.disks...)
	var events []capture.Event
	for tail := s.Tail(); s.Consumed() < tail; {
		if _, err := s.Next(t.Context(), time.Millisecond, func(e capture.Event) error {
			e.Data = append([]byte(nil), e.Data...)
			events = append(events, e)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if len(events) < 100 || len(events) > 1000 {
		t.Fatalf("%d events: %+v", len(events), s.Stats())
	}
	oracle.Skip(oracle.Due() - len(events))
	for _, e := range events {
		if err := oracle.Event(e); err != nil {
			t.Fatal(err)
		}
	}
}

// TestKillOverflow: the ring runs over while there is no process. The Lost stands at its
// place, and what came behind it is dirty, and no more than that.
func TestKillOverflow(t *testing.T) {
	b := newBench(t, 8<<20, 4<<20)
	o := Options{RingBytes: 1 << 20, Pin: b.pins, Hold: true}
	s, r := b.exact(t, o)
	oracle := b.oracle(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	kill := startChild(t, childTask{Sets: [][]capture.Disk{b.disks}, Options: o})
	rng := rand.New(rand.NewPCG(3, 1))
	b.load(t, rng, 100, oracle)
	kill()
	b.load(t, rng, 100, oracle)
	b.load(t, rng, 1000, oracle)
	s = b.open(t, o, b.disks...)
	if !s.Adopted() || s.Stats().Mode != capture.ModeBitmap {
		t.Fatalf("adopted %v, %+v", s.Adopted(), s.Stats())
	}
	r.Adopt(s)
	taken := 0
	r.OnExact = func(e capture.Event) error { taken++; return oracle.Event(e) }
	capturedUpTo(t, r, s)
	if r.Losts() != 1 || r.Exact() || taken < 200 {
		t.Fatalf("%d losts, exact %v, %d events", r.Losts(), r.Exact(), taken)
	}
	for _, d := range s.Disks() { // at the Lost, the copy is what was there then
		if err := r.Compare(d.ID, oracle.Image(d.ID)); err != nil {
			t.Error(err)
		}
	}
	dirty, err := s.Dirty()
	if want := int64(oracle.Due()) * 4096; err != nil || dirty > want || dirty == 0 {
		t.Errorf("%d bytes dirty after %d writes that were not captured: %v", dirty, oracle.Due(), err)
	}
	checkDirty(t, s, oracle, dirty)
	closeExact(t, r)
	mustEqual(t, r)
}

// checkDirty takes the dirty set and compares it with the blocks of the writes that the
// oracle still waits for. It puts everything back.
func checkDirty(t *testing.T, s capture.Survivor, oracle *capturetest.Oracle, dirty int64) {
	t.Helper()
	var noted []dr.Extent
	xs, err := s.TakeDirtyNoted(1<<40, func(xs []dr.Extent) { noted = append(noted, xs...) })
	if err != nil {
		t.Fatal(err)
	}
	set := map[dr.Extent]bool{}
	for _, x := range xs {
		for off := x.Offset; off < x.End(); off += 4096 {
			set[dr.Extent{Disk: x.Disk, Offset: off, Length: 4096}] = true
		}
		if err := s.Mark(x); err != nil {
			t.Fatal(err)
		}
	}
	if int64(len(set))*4096 != dirty || len(noted) != len(xs) {
		t.Errorf("took %d blocks of %d bytes, noted %d ranges of %d", len(set), dirty, len(noted), len(xs))
	}
	want := map[dr.Extent]bool{}
	for _, op := range oracle.Rest() {
		want[op.Extent] = true
	}
	if !maps.Equal(set, want) {
		t.Errorf("%d blocks are dirty, %d were written and not captured", len(set), len(want))
	}
}

// TestKilledWhileReplacing kills a process that changes its disks all the time, at
// any moment; disk 2 is always among them and must never lose a change.
func TestKilledWhileReplacing(t *testing.T) {
	b := newBench(t, 2<<20, 8<<20, 2<<20)
	o := Options{RingBytes: 1 << 20, Pin: b.pins}
	sets := [][]capture.Disk{{b.disks[0], b.disks[1]}, {b.disks[1], b.disks[2]}, {b.disks[1]}}
	s := b.open(t, o, sets[2]...)
	r := capturetest.NewReplicator(s)
	if err := r.MarkAll(); err != nil {
		t.Fatal(err)
	}
	closeExact(t, r)
	stop := writers(t, b.devs[1], 8<<20, 2, 200*time.Microsecond)
	rng := rand.New(rand.NewPCG(5, 5))
	states := map[string]int{}
	for range 8 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		kill := startChild(t, childTask{Sets: sets, Options: o, Again: true})
		time.Sleep(time.Duration(rng.Int64N(int64(300 * time.Millisecond))))
		kill()
		states[pinState(b.pins)]++
		s = b.open(t, o, sets[2]...)
		if len(s.Inherited()) != 1 {
			t.Fatalf("inherited %v from %v", s.Inherited(), states)
		}
		r.MustSync()
		r.Adopt(s)
		closeExact(t, r)
	}
	stop()
	capturedUpTo(t, r, s)
	closeExact(t, r)
	mustEqual(t, r)
	t.Logf("found pins: %v", states)
}

func pinState(pins string) (state string) {
	for _, name := range []string{pinLive, pinNew, pinOld} {
		if exists(filepath.Join(pins, name)) {
			state += name + " "
		}
	}
	return state
}
