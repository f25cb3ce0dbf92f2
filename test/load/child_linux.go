package load

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// childVariable names the directory that a child process is to load.
const childVariable = "FARSIDE_LOAD_DIR"

// slowVariable says by how much each of its pauses is to be longer than usual.
const slowVariable = "FARSIDE_LOAD_SLOW"

// Main is to be called first in TestMain by whoever uses Start: in the child
// process it runs the load and exits, elsewhere it does nothing.
func Main() {
	dir := os.Getenv(childVariable)
	if dir == "" {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // ends when the parent closes it, or dies
		cancel()
	}()
	if err := Mixed(ctx, dir, 1, &printer{}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// printer tells the parent of each commit.
type printer struct{ mu sync.Mutex }

// Record implements recorder.
func (p *printer) Record(row int64, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Printf("%d %d\n", row, at.UnixNano())
}

// Start runs Mixed on dir in a child process and records its commits in o, until
// stop is called. All commits are recorded when stop returns.
func Start(dir string, o *Oracle) (stop func() error, err error) { return StartSlow(dir, 1, o) }

// StartSlow is Start of a load whose pauses are slow times as long, and that has some where
// it else has none.
func StartSlow(dir string, slow int, o *Oracle) (stop func() error, err error) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childVariable+"="+dir, fmt.Sprintf("%s=%d", slowVariable, slow))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start load: %w", err)
	}
	read := make(chan error, 1)
	go func() {
		for r := bufio.NewReader(out); ; {
			var row, at int64
			if _, err := fmt.Fscanln(r, &row, &at); err != nil {
				if errors.Is(err, io.EOF) {
					err = nil
				}
				read <- err
				return
			}
			o.Record(row, time.Unix(0, at))
		}
	}()
	return func() error {
		in.Close() // the load ends by it
		err := <-read
		return errors.Join(err, cmd.Wait())
	}, nil
}
