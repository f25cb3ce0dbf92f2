package messages

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// variable tells a child process its part: "LOG".
const variable = "FARSIDE_TEST_MESSAGES"

// logName is the name of a process's log in its directory.
const logName = "messages.log"

// recordSize is the length of a record: a letter, a number, a line end.
const recordSize = 16

// Main is to be called in TestMain by whoever uses Start: in a child process it
// is a member of the ring and exits, elsewhere it does nothing.
func Main() {
	name := os.Getenv(variable)
	if name == "" {
		return
	}
	if err := member(name, os.Stdin, os.Stdout); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		fmt.Fprintln(os.Stderr, "messages:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// member takes numbers from in and passes on what follows each, until in ends.
func member(name string, in io.Reader, out io.Writer) error {
	log, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	note := func(what byte, n int64) error {
		if _, err := fmt.Fprintf(log, "%c%014d\n", what, n); err != nil {
			return err
		}
		return log.Sync()
	}
	for r := bufio.NewReader(in); ; {
		text, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
		if err != nil {
			return err
		}
		if err := note('R', n); err != nil {
			return err
		}
		if err := note('S', n+1); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(out, n+1); err != nil {
			return err
		}
	}
}

// Ring is a ring of processes that pass numbers on.
type Ring struct {
	cmds   []*exec.Cmd
	starts []*os.File // write ends of the pipes
}

// Start starts a process for each directory, each of which sends to the next, and lets
// inFlight messages go round. Call Stop.
func Start(dirs []string, inFlight int) (*Ring, error) {
	r := &Ring{}
	ins := make([]*os.File, len(dirs))
	for i := range dirs {
		in, out, err := os.Pipe()
		if err != nil {
			return nil, errors.Join(err, r.Stop())
		}
		ins[i] = in
		r.starts = append(r.starts, out)
	}
	for i, dir := range dirs {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), variable+"="+filepath.Join(dir, logName))
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = ins[i], r.starts[(i+1)%len(dirs)], os.Stderr
		if err := cmd.Start(); err != nil {
			return nil, errors.Join(err, r.Stop())
		}
		r.cmds = append(r.cmds, cmd)
		ins[i].Close()
	}
	// Numbers of different messages must not meet: they are a million million apart.
	for m := range inFlight {
		if _, err := fmt.Fprintln(r.starts[m%len(dirs)], int64(m)*1_000_000_000_000); err != nil {
			return nil, errors.Join(err, r.Stop())
		}
	}
	return r, nil
}

// Stop ends the processes. A member whose disk is frozen ends when it is thawed.
func (r *Ring) Stop() error {
	var errs []error
	for _, w := range r.starts {
		w.Close()
	}
	for _, c := range r.cmds {
		_ = c.Process.Kill() // the ring has no other end: each holds the next one's pipe
		if err := c.Wait(); err != nil && c.ProcessState.Exited() {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Log is what one disk says.
type Log struct {
	Sent, Received map[int64]bool
}

// ReadLog reads the log in a directory. An incomplete record at its end is left
// out: it was not synced.
func ReadLog(dir string) (*Log, error) {
	b, err := os.ReadFile(filepath.Join(dir, logName))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l := &Log{Sent: map[int64]bool{}, Received: map[int64]bool{}}
	for ; len(b) >= recordSize; b = b[recordSize:] {
		n, err := strconv.ParseInt(string(b[1:recordSize-1]), 10, 64)
		switch {
		case err != nil || b[recordSize-1] != '\n':
			return nil, fmt.Errorf("record %q: not one of this log", b[:recordSize])
		case b[0] == 'S':
			l.Sent[n] = true
		case b[0] == 'R':
			l.Received[n] = true
		default:
			return nil, fmt.Errorf("record %q: not one of this log", b[:recordSize])
		}
	}
	return l, nil
}

// Violations returns the messages that were received, but never sent: effects without
// their cause. logs are in the order of Start.
func Violations(logs []*Log) (bad []string) {
	for i, l := range logs {
		from := logs[(i+len(logs)-1)%len(logs)]
		for n := range l.Received {
			if n%1_000_000_000_000 != 0 && !from.Sent[n] {
				bad = append(bad, fmt.Sprintf("member %d received %d, which the one before it never sent", i, n))
			}
		}
	}
	return bad
}
