//go:build unix

package quiesce

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// maxOutput bounds what is kept of a hook's output, in bytes.
const maxOutput = 64 << 10

const (
	// termGrace is how long a hook that was told to end may take.
	termGrace = 2 * time.Second
	// outputGrace is how long output is waited for behind the end of a hook: what it
	// left running may still hold the pipe.
	outputGrace = 100 * time.Millisecond
)

func ownerOf(info fs.FileInfo) (uint32, bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return st.Uid, true
}

// execute runs a program in a process group of its own, at most for limit and until ctx
// ends, and returns what it wrote.
func execute(ctx context.Context, file, dir string, env []string, limit time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	out, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	kept := make(chan []byte, 1)
	go func() { kept <- keep(out) }() // ends when out is closed
	cmd := exec.Command(file)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, env, in, in
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	in.Close()
	if err == nil {
		err = await(ctx, cmd, limit)
	}
	err = errors.Join(err, out.SetReadDeadline(time.Now().Add(outputGrace)))
	text := <-kept
	return text, errors.Join(err, out.Close())
}

// await waits for a program and ends it, with all of its group, when ctx ends.
func await(ctx context.Context, cmd *exec.Cmd, limit time.Duration) error {
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	group := -cmd.Process.Pid
	term := syscall.Kill(group, syscall.SIGTERM)
	select {
	case <-done: //nolint:errcheck // it was told to end: how it did doesn't matter
	case <-time.After(termGrace):
	}
	if err := syscall.Kill(group, syscall.SIGKILL); err != nil && term != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("end it: %w", err)
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("it ran longer than it may (%s): %w", limit, ErrTimeout)
	}
	return ctx.Err()
}

// keep reads all of r and returns the beginning.
func keep(r io.Reader) []byte {
	text, err := io.ReadAll(io.LimitReader(r, maxOutput))
	if err == nil && len(text) == maxOutput {
		io.Copy(io.Discard, r) //nolint:errcheck // the program must be able to go on writing
	}
	return text
}
