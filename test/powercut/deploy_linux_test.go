package powercut

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/demo/stage"
	"farside/internal/nbd"
	"farside/internal/testenv"
)

const (
	blocks    = 256 // of the protected disk that the load writes
	blockSize = 4096
)

// fill is the content of a block since write n, which counts from 1.
func fill(n uint64, block int) (b [blockSize]byte) {
	for i := 0; i < blockSize; i += 16 {
		binary.LittleEndian.PutUint64(b[i:], n)
		binary.LittleEndian.PutUint64(b[i+8:], uint64(block*blockSize+i))
	}
	return b
}

// ack is what a peer was told.
type ack struct {
	at     int    // length of the log afterwards
	writes uint64 // so many writes of the load had returned before
	name   string // of the tag or the token
	seq    uint64 // that was said to be stored
}

// cut is a deployment with a role's directory on a recorded disk, and a load whose every write is known.
type cut struct {
	t       *testing.T
	dir     string
	role    string
	log     *Log
	disk    *Disk
	unmount func() error
	stage   *stage.Stage
	source  *nbd.Client
	rng     *rand.Rand
	written []int // block of each write
	acks    []ack
	most    uint64 // writes of the load that a spool held
}

// program builds farside.
func program(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "farside")
	cmd := exec.Command("go", "build", "-o", path, "../../cmd/farside")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build farside: %v: %s", err, out)
	}
	return path
}

// deploy raises a deployment in which the directory of role lies on a recorded disk, and protects a disk. With unsynced, that role's
// fsync and fdatasync do nothing.
func deploy(t *testing.T, role string, unsynced bool) *cut {
	t.Helper()
	t.Parallel()
	testenv.NeedRoot(t)
	if testing.Short() {
		t.Skip("runs whole processes: not with -short")
	}
	c := &cut{t: t, dir: t.TempDir(), role: role, log: NewLog(1 << 30), rng: rand.New(rand.NewPCG(4, 4))}
	c.disk, c.unmount = newDisk(t, filepath.Join(c.dir, role), 512<<20, c.log)
	disk := filepath.Join(c.dir, "source.img")
	if err := os.WriteFile(disk, make([]byte, blocks*blockSize), 0o600); err != nil {
		t.Fatal(err)
	}
	run := program(t)
	if unsynced {
		run = withoutSync(t, run, role)
	}
	var err error
	c.stage, err = stage.Raise(t.Context(), stage.Options{Dir: c.dir, Program: run, Driver: "tap", Disk: disk})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.strike)
	far := &c.stage.Far
	if err := errors.Join(far.Offered(t.Context(), disk), far.Protect(t.Context(), disk, "tap")); err != nil {
		t.Fatal(err)
	}
	err = stage.Poll(t.Context(), time.Minute, "wait until the disk is protected", func(ctx context.Context) (bool, error) {
		m, err := far.State(ctx)
		return m.GetState() == farsidev1.MachineState_MACHINE_STATE_PROTECTED && m.GetNewest() != nil, err
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.source, err = nbd.Dial(t.Context(), stage.TapURI(c.dir), nil); err != nil {
		t.Fatal(err)
	}
	return c
}

// strike ends the deployment, so that nothing holds the disk.
func (c *cut) strike() {
	if c.source != nil {
		_ = c.source.Close() // the tap may be gone
		c.source = nil
	}
	if c.stage == nil {
		return
	}
	if err := c.stage.Strike(); err != nil {
		c.t.Error(err)
	}
	c.stage = nil
}

// write does n writes, some of them to the same blocks again and again.
func (c *cut) write(n int) {
	c.t.Helper()
	for range n {
		block := c.rng.IntN(blocks)
		if c.rng.IntN(2) == 0 {
			block %= 8
		}
		b := fill(uint64(len(c.written)+1), block)
		if _, err := c.source.WriteAt(b[:], int64(block)*blockSize); err != nil {
			c.t.Fatal(err)
		}
		c.written = append(c.written, block)
	}
}

// told notes an acknowledgement that was just seen, of what had been written by then.
func (c *cut) told(writes int, name string) {
	c.acks = append(c.acks, ack{at: c.log.Len(), writes: uint64(writes), name: name})
}

// prefix says how many writes of the load a disk holds, which must be the first, with nothing torn.
func (c *cut) prefix(read func(p []byte, off int64) error) (n uint64, err error) {
	all := make([]byte, blocks*blockSize)
	if err := read(all, 0); err != nil {
		return 0, err
	}
	for i := range blocks {
		n = max(n, binary.LittleEndian.Uint64(all[i*blockSize:]))
	}
	if n > uint64(len(c.written)) {
		return 0, fmt.Errorf("a write %d that was never made is served", n)
	}
	var last [blocks]uint64
	for i, block := range c.written[:n] {
		last[block] = uint64(i + 1)
	}
	for i := range blocks {
		var want [blockSize]byte
		if last[i] != 0 {
			want = fill(last[i], i)
		}
		if [blockSize]byte(all[i*blockSize:]) != want {
			return n, fmt.Errorf("block %d is not as after write %d", i, n)
		}
	}
	return n, nil
}

// judge makes n power cuts after the first acknowledgement and lets check judge what is left; it returns what was found.
func (c *cut) judge(n int, check func(dir string, seen []ack) error) (bad []error) {
	c.t.Helper()
	c.strike()
	if err := c.unmount(); err != nil {
		c.t.Fatal(err)
	}
	if len(c.acks) == 0 {
		c.t.Fatal("nothing was acknowledged")
	}
	first, last := c.acks[0].at, c.log.Len()
	cuts := make([]int, n)
	for i := range cuts {
		cuts[i] = first + c.rng.IntN(last-first)
		if i%2 == 0 { // just behind an acknowledgement, where most is at stake
			cuts[i] = c.acks[c.rng.IntN(len(c.acks))].at
		}
	}
	slices.Sort(cuts)
	replay := NewReplay(c.log)
	dir := filepath.Join(c.dir, "image")
	if err := os.Mkdir(dir, 0o700); err != nil {
		c.t.Fatal(err)
	}
	began, changes := time.Now(), 0
	for i, at := range cuts {
		seed := uint64(i)
		m, open := replay.Cut(at, rand.New(rand.NewPCG(seed, 11)))
		changes += open
		var seen []ack
		for _, a := range c.acks {
			if a.at <= at {
				seen = append(seen, a)
			}
		}
		err := mounted(c.disk, m, dir, func() error { return check(dir, seen) })
		if errors.Is(err, errStuck) {
			c.t.Fatal(err)
		}
		if err != nil {
			bad = append(bad, fmt.Errorf("cut at %d of %d, seed %d, %d changes open: %w", at, last, seed, open, err))
		}
	}
	c.t.Logf("%s: %d writes, %d acknowledgements, log of %d; %d power cuts with %d open changes in %.1f s",
		c.role, len(c.written), len(c.acks), last, n, changes, time.Since(began).Seconds())
	return bad
}

// images is how many power cuts a test makes.
func images(few int) int {
	if os.Getenv("FARSIDE_LONG") == "1" {
		return 50 * few
	}
	return few
}
