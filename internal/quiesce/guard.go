package quiesce

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"sync"
	"time"

	"farside/internal/dr"
)

// The agent and its watchdog talk over two pipes, in records of eight bytes:
//
//	 0      1      2             4                    8
//	┌──────┬──────┬─────────────┬────────────────────┐
//	│ what │ zero │ index (u16) │ milliseconds (u32) │  little-endian
//	└──────┴──────┴─────────────┴────────────────────┘
const recordSize = 8

// What a record says. The agent sends the first four, the watchdog the others.
const (
	recArm      = 'A' // thaw after so many milliseconds; answered
	recFreezing = 'F' // the file system of that index may be frozen from now on
	recThawed   = 'U' // it is not frozen by us any more
	recDone     = 'D' // nothing is: end
	recReady    = 'R' // locked in memory and rehearsed
	recArmed    = 'K'
)

type record struct {
	what  byte
	index uint16
	after time.Duration // whole milliseconds
}

func (r record) bytes() []byte {
	b := make([]byte, recordSize)
	b[0] = r.what
	binary.LittleEndian.PutUint16(b[2:], r.index)
	binary.LittleEndian.PutUint32(b[4:], uint32(min(r.after.Milliseconds(), math.MaxUint32)))
	return b
}

// parseRecord reads a record that goes either way. Errors wrap dr.ErrInvalid.
func parseRecord(b []byte) (record, error) {
	if len(b) != recordSize || b[1] != 0 {
		return record{}, fmt.Errorf("watchdog record of %d bytes: %w", len(b), dr.ErrInvalid)
	}
	r := record{
		what: b[0], index: binary.LittleEndian.Uint16(b[2:]),
		after: time.Duration(binary.LittleEndian.Uint32(b[4:])) * time.Millisecond,
	}
	switch r.what {
	case recArm, recFreezing, recThawed, recDone, recReady, recArmed:
		return r, nil
	}
	return record{}, fmt.Errorf("watchdog record %q: %w", r.what, dr.ErrInvalid)
}

// The times after which a watchdog that does not answer is given up.
const (
	readyLimit = 10 * time.Second // it has to be loaded
	armLimit   = time.Second
	closeLimit = time.Second
)

// process is the guard that runs as a process of its own.
type process struct {
	cmd    *exec.Cmd
	orders *os.File
	mu     sync.Mutex // of orders
	ready  chan struct{}
	armed  chan struct{}
	gone   chan struct{}
	wait   sync.WaitGroup // the reader of answers
}

// startGuard starts this program with the arguments as the watchdog of the
// files, and returns when it is ready. Errors wrap dr.ErrUnavailable.
func startGuard(args []string, files []*os.File) (guard, error) {
	in, orders, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	answers, out, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, in.Close(), orders.Close())
	}
	// The name that the program was started by may mean another version by now.
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Stdin, cmd.Stdout, cmd.ExtraFiles = in, out, files
	cmd.SysProcAttr = ownSession()
	cmd.Env = []string{"GOGC=off", "GOMEMLIMIT=off", "GOMAXPROCS=2", "FARSIDE_WATCHDOG=1"}
	cmd.Dir = "/"
	err = cmd.Start()
	// Its ends must be its own alone, or its death would not end the answers.
	err = errors.Join(err, in.Close(), out.Close())
	if err != nil {
		return nil, errors.Join(err, orders.Close(), answers.Close())
	}
	p := &process{cmd: cmd, orders: orders, ready: make(chan struct{}), armed: make(chan struct{}, 1), gone: make(chan struct{})}
	p.wait.Go(func() { p.listen(answers) })
	if err := p.await(p.ready, readyLimit, "get ready"); err != nil {
		p.kill()
		return nil, err
	}
	return p, nil
}

// listen takes the answers until the watchdog is gone.
func (p *process) listen(answers *os.File) {
	defer close(p.gone)
	defer answers.Close()
	ready := false
	for r := bufio.NewReader(answers); ; {
		b := make([]byte, recordSize)
		if _, err := io.ReadFull(r, b); err != nil {
			break
		}
		switch rec, err := parseRecord(b); {
		case err != nil:
		case rec.what == recReady && !ready:
			ready = true
			close(p.ready)
		case rec.what == recArmed:
			select {
			case p.armed <- struct{}{}:
			default:
			}
		}
	}
}

func (p *process) await(what <-chan struct{}, limit time.Duration, verb string) error {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-what:
		return nil
	case <-p.gone:
		return fmt.Errorf("it died: %w", dr.ErrUnavailable)
	case <-t.C:
		return fmt.Errorf("it did not %s within %s: %w", verb, limit, dr.ErrUnavailable)
	}
}

// send never waits: the pipe has room for thousands of records.
func (p *process) send(r record) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.orders.SetWriteDeadline(time.Now().Add(armLimit)); err != nil {
		return err
	}
	if _, err := p.orders.Write(r.bytes()); err != nil {
		return fmt.Errorf("%w: %w", dr.ErrUnavailable, err)
	}
	return nil
}

func (p *process) Arm(limit time.Duration) error {
	if err := p.send(record{what: recArm, after: limit}); err != nil {
		return err
	}
	return p.await(p.armed, armLimit, "answer")
}

func (p *process) Freezing(i int) error {
	select {
	case <-p.gone:
		return fmt.Errorf("it died: %w", dr.ErrUnavailable)
	default:
	}
	return p.send(record{what: recFreezing, index: uint16(i)})
}

func (p *process) Thawed(i int) {
	// If it can't be told, it is dead.
	_ = p.send(record{what: recThawed, index: uint16(i)})
}

func (p *process) Gone() <-chan struct{} { return p.gone }

func (p *process) Close() error {
	err := p.send(record{what: recDone})
	select {
	case <-p.gone:
	case <-time.After(closeLimit):
	}
	p.kill()
	return err
}

// kill ends the watchdog whatever it does. Only for one that has nothing to thaw.
func (p *process) kill() {
	p.cmd.Process.Kill() //nolint:errcheck // it may have ended already
	p.cmd.Wait()         //nolint:errcheck // how it ended doesn't matter
	p.wait.Wait()
	p.orders.Close()
}
