package agent

import (
	"os"
	"runtime/debug"

	"farside/internal/capture"
)

const (
	// besideFrames is what a replicator holds besides frames at most: two sets of
	// ranges per disk (written and touched: 65,536 ranges each, 2 MiB), the buffer of bulk reads (1 MiB), RPO
	// records and positions of frames (1 MiB). The frame under construction is in batchRoom.
	besideFrames = 6 << 20

	// besideMemory is what the process holds besides the memory that it was given: its code and stacks,
	// TLS, control, the garbage that Go has not collected yet.
	besideMemory = 48 << 20
)

// budget divides the memory that was given between the frames that wait and all else.
func (t *tuning) budget(memory int64, src capture.Source) {
	t.memory = memory - besideFrames
	if v, ok := src.(capture.Survivor); ok && v.Memory() != nil {
		return // the ledger is in memory of the kernel
	}
	// At least 5 MiB, which is what a ledger needs, since memory is minMemory or more.
	t.ledger = int(min(int64(ledgerSize(src.Disks())), max(memory/4, minLedger)))
	t.memory -= int64(t.ledger)
}

// limitGo makes Go's garbage collector work harder before the process holds much more
// than it was given, unless GOMEMLIMIT says something else. It is a soft limit: what is in use stays.
func limitGo(memory int64) {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memory + besideMemory)
	}
}
