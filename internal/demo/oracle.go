package demo

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
)

// commit is one commit that the load was told is durable on the disk. Times are UTC nanoseconds.
type commit struct {
	N          int64 // from 1, without gaps
	Begin, End int64 // just before the transaction began, just after the commit returned
}

// oracle knows every commit of the load from a log that lies outside the protected disk. The load appends
// lines "N BEGIN END"; refresh reads what has come since. Safe for concurrent use.
type oracle struct {
	mu struct {
		sync.Mutex
		file    *os.File
		rest    string // a line whose end is not there yet
		commits []commit
	}
}

// openOracle follows the log at path, which it makes.
func openOracle(path string) (*oracle, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log of commits: %w", err)
	}
	o := &oracle{}
	o.mu.file = f
	return o, nil
}

// append is the load's side: it writes one line with one write, so that a load that is killed leaves no half
// line but the last.
func appendCommit(w io.Writer, c commit) error {
	if _, err := fmt.Fprintf(w, "%d %d %d\n", c.N, c.Begin, c.End); err != nil {
		return fmt.Errorf("log commit %d: %w", c.N, err)
	}
	return nil
}

// refresh reads the lines that were appended since the last call.
func (o *oracle) refresh() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	r := bufio.NewReader(o.mu.file)
	for {
		part, err := r.ReadString('\n')
		o.mu.rest += part
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the log of commits: %w", err)
		}
		var c commit
		if _, err := fmt.Sscanf(o.mu.rest, "%d %d %d\n", &c.N, &c.Begin, &c.End); err != nil {
			return fmt.Errorf("read the log of commits: line %q: %w", o.mu.rest, err)
		}
		o.mu.rest = ""
		if want := int64(len(o.mu.commits)) + 1; c.N != want {
			return fmt.Errorf("read the log of commits: commit %d where %d was due", c.N, want)
		}
		o.mu.commits = append(o.mu.commits, c)
	}
}

// returnedBy counts the commits that had returned at t; since they are made one after another, these are 1 to
// the count.
func (o *oracle) returnedBy(t int64) int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	commits := o.mu.commits
	for i := len(commits); i > 0; i-- {
		if commits[i-1].End <= t {
			return int64(i)
		}
	}
	return 0
}

// count returns how many commits are known.
func (o *oracle) count() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return int64(len(o.mu.commits))
}

func (o *oracle) Close() error { return o.mu.file.Close() }
