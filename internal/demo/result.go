package demo

import (
	"fmt"
	"time"
)

// Result is what the demo measured and found; `farside demo --json` prints it.
type Result struct {
	Capture            string  `json:"capture"`               // driver: "ebpf" or "tap"
	Writes             int64   `json:"writes"`                // captured, up to the disaster
	Bytes              int64   `json:"bytes"`                 // captured, up to the disaster
	InitialReplication float64 `json:"initial_replication_s"` // seconds
	RPO                RPO     `json:"rpo_ms"`
	ViewOpen           float64 `json:"view_open_ms"` // from the call to the answer of the NBD export
	RTO                float64 `json:"rto_ms"`       // from the call to the open database on the recovered disk
	Committed          int64   `json:"committed"`    // commits that had returned before the disaster
	Recovered          int64   `json:"recovered"`    // commits found on the recovered disk
	LostDurable        int64   `json:"lost_durable"` // commits that were durable on the far side but are missing
	LostRPO            int64   `json:"lost_rpo"`     // commits that had returned but were not yet durable there
	ReplicaEqual       bool    `json:"replica_equal"`
	Fsck               string  `json:"fsck"`     // "clean", "skipped" or what is wrong
	Database           string  `json:"database"` // "ok" or what is wrong
	Boot               Boot    `json:"boot"`
}

// RPO says how old the newest recoverable write was, in milliseconds.
type RPO struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

// Boot says how the guest did.
type Boot struct {
	Accel   string  `json:"accel"` // "tcg", "kvm", or "" if no guest was booted
	Seconds float64 `json:"seconds"`
	Marker  bool    `json:"marker"`            // the guest read the replica and found what was expected
	Skipped string  `json:"skipped,omitempty"` // why no guest was booted
}

// Bad says what in the result is not as it must be, or is nil.
func (r *Result) Bad() error {
	switch {
	case r.LostDurable != 0:
		return fmt.Errorf("%d commits are missing that were durable on the far side", r.LostDurable)
	case r.Recovered == 0:
		return fmt.Errorf("nothing was recovered")
	case !r.ReplicaEqual:
		return fmt.Errorf("the replica differed from the disk")
	case r.Fsck != "clean" && r.Fsck != "skipped":
		return fmt.Errorf("the recovered file system is not clean: %s", r.Fsck)
	case r.Database != "ok":
		return fmt.Errorf("the recovered database is not right: %s", r.Database)
	case r.Boot.Accel != "" && !r.Boot.Marker:
		return fmt.Errorf("the guest did not read the replica as it should")
	}
	return nil
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
