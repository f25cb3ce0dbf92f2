package agent

import (
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
)

// recordFile is what an agent leaves on disk for the next one. It decides nothing about what is
// sent: a capture that goes on proves itself (ledger), and any other begins with a comparison.
// It only says why.
const recordFile = "capture.json"

// record is the content of that file.
type record struct {
	Boot  string `json:"boot"`  // id of the boot in which the agent ran
	Ended bool   `json:"ended"` // the agent was asked to end and did

	keeper keeper
}

// keeper keeps small files; see control.Client.
type keeper interface {
	Keep(name string, content []byte) error
	Kept(name string) ([]byte, error)
}

// newRecord is for an agent that begins in a boot.
func newRecord(k keeper, boot string) *record { return &record{Boot: boot, keeper: k} }

// reason tells how the agent before this one ended, and notes that this one runs.
func (r *record) reason(log *slog.Logger) Reason {
	reason := reasonAfter(r.last(log), r.Boot)
	r.save(log)
	return reason
}

// reasonAfter tells it from what that one left: nil if it left nothing.
func reasonAfter(last *record, boot string) Reason {
	switch {
	case last == nil || last.Boot == "" || boot == "" || last.Boot == boot:
		return ReasonRestart
	case last.Ended:
		return ReasonReboot
	}
	return ReasonUnclean
}

func (r *record) last(log *slog.Logger) *record {
	b, err := r.keeper.Kept(recordFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	last := &record{}
	if err == nil {
		err = json.Unmarshal(b, last)
	}
	if err != nil {
		log.Warn("what the agent before left can't be read; the disks are compared anyway if need be", "error", err)
		return nil
	}
	return last
}

// ended notes that the agent ended in order.
func (r *record) ended(log *slog.Logger) {
	r.Ended = true
	r.save(log)
}

func (r *record) save(log *slog.Logger) {
	b, err := json.Marshal(r)
	if err == nil {
		err = r.keeper.Keep(recordFile, append(b, '\n'))
	}
	if err != nil {
		log.Warn("the reason of the next comparison may be told wrong", "error", err)
	}
}
