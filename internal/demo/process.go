package demo

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// process is a program of the demo: a role, the load. It dies with the demo.
type process struct {
	name string
	log  string // file with what it prints
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended; err is valid then
	err  error
}

// start starts a program; what it prints goes to the file log.
func start(name, log string, cmd *exec.Cmd) (*process, error) {
	f, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	dieWithParent(cmd)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{name: name, log: log, cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// patience is how long a process may take to end when asked to.
const patience = 5 * time.Second

// stop asks the process to end, waits, and kills it if it doesn't.
func (p *process) stop() error {
	_ = terminate(p.cmd.Process) // it may have ended already
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
	}
	err := fmt.Errorf("%s did not end within %v when asked to and was killed", p.name, patience)
	err = errors.Join(err, p.cmd.Process.Kill())
	<-p.done
	return err
}

// ended says why a process that should run does not, or nil if it runs.
func (p *process) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s has ended: %w; it said last:\n%s", p.name, cmpErr(p.err), lastLines(p.log, 5))
	default:
		return nil
	}
}

func cmpErr(err error) error {
	if err == nil {
		return errors.New("without an error")
	}
	return err
}

// lastLines returns the last n lines of a file, or why it can't.
func lastLines(path string, n int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
