package stage

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// Process is a program on the stage: a role, the load. It dies with the caller.
type Process struct {
	Name string
	log  string // file with what it prints
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended; err is valid then
	err  error
}

// Start starts a program; what it prints goes to the file log.
func Start(name, log string, cmd *exec.Cmd) (*Process, error) {
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
	p := &Process{Name: name, log: log, cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// PID returns the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// patience is how long a process may take to end when asked to.
const patience = 5 * time.Second

// Stop asks the process to end, waits, and kills it if it doesn't.
func (p *Process) Stop() error {
	_ = Terminate(p.cmd.Process) // it may have ended already
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
	}
	err := fmt.Errorf("%s did not end within %v when asked to and was killed", p.Name, patience)
	err = errors.Join(err, p.cmd.Process.Kill())
	<-p.done
	return err
}

// Kill ends the process at once and waits for its end.
func (p *Process) Kill() error {
	err := p.cmd.Process.Kill()
	<-p.done
	if errors.Is(err, os.ErrProcessDone) {
		return p.Ended() // nobody asked it to
	}
	return err
}

// Ended says why a process that should run does not, or nil if it runs.
func (p *Process) Ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s has ended: %w; it said last:\n%s", p.Name, cmpErr(p.err), LastLines(p.log, 5))
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

// LastLines returns the last n lines of a file, or why it can't.
func LastLines(path string, n int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
