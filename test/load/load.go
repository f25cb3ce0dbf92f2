// Package load puts a mixed, realistic load on a mounted file system and
// remembers what it was told is durable, so that a test can judge a recovered
// disk. It is for tests and benchmarks only.
//
// Mixed starts workers (direct, buffered and memory-mapped writes, a SQLite
// database, directory operations, discards) and waits for them; Start runs it in
// a process of its own. That is needed wherever the file system is frozen: a store
// to a mapped page then blocks its thread where Go can't stop it, and with the
// next garbage collection the whole process. The Oracle is
// safe for concurrent use. It doesn't capture or replicate anything.
package load

import (
	"sync"
	"time"
)

// Commit is a database commit that the load was told is durable.
type Commit struct {
	Row  int64 // the number in the row that it inserted
	Time int64 // UTC ns right after the commit returned
}

// Oracle is the list of commits, kept off the disk under test.
type Oracle struct {
	mu struct {
		sync.Mutex
		commits []Commit
	}
}

// Record notes that a row was durable at a time.
func (o *Oracle) Record(row int64, at time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.mu.commits = append(o.mu.commits, Commit{row, at.UnixNano()})
}

// DurableBefore returns the highest row whose commit had returned before t
// (UTC ns); 0 if none had.
func (o *Oracle) DurableBefore(t int64) int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	row := int64(0)
	for _, c := range o.mu.commits {
		if c.Time < t {
			row = max(row, c.Row)
		}
	}
	return row
}

// Last returns the highest row recorded.
func (o *Oracle) Last() int64 { return o.DurableBefore(1<<63 - 1) }

// LongestPause returns the longest time between two commits that follow each other, or
// between one and an end of the time from one moment to another (UTC ns).
func (o *Oracle) LongestPause(from, to int64) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	longest, last := int64(0), from
	for _, c := range o.mu.commits {
		if c.Time > last && c.Time <= to {
			longest, last = max(longest, c.Time-last), c.Time
		}
	}
	return time.Duration(max(longest, to-last))
}
