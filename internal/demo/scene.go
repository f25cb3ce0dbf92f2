package demo

import (
	"context"
	"io"
	"time"
)

// scene is the protected side of the demo: a disk, a load on it, the log of what was committed, the disaster, and
// the judgement of what came back. There are two: an ext4 with a SQLite database on a loop device, captured by
// eBPF; and a disk of records behind a tap, for machines where we are not root.
type scene interface {
	// path is the disk as the agent knows it.
	path() string
	// begin starts the load. It is called before the disk is protected if live is true, else after.
	begin(ctx context.Context) error
	live() bool
	// running says why the load has ended, or nil if it runs.
	running() error
	// commits is the log of commits.
	commits() *oracle
	// frozen calls fn while nothing changes the disk and all that was written is on it.
	frozen(ctx context.Context, fn func(ctx context.Context, disk io.ReaderAt) error) error
	// disaster overwrites the disk while the load goes on; it says what became of the load.
	disaster(ctx context.Context) (string, error)
	// judge examines a raw image of the recovered disk.
	judge(ctx context.Context, image string) (judgement, error)
	// close ends the load and takes the disk away.
	close() error
}

// judgement is what the examination of a recovered disk gave.
type judgement struct {
	verdict
	// Fsck is "clean", "skipped" or what is wrong.
	Fsck string
	// Opened is the moment when the database had answered its first question; zero if it didn't.
	Opened time.Time
	// Read is how many bytes a guest shall sum (guest.Task.Sum), Sums what it must answer.
	Read int64
	Sums map[string]string
}
