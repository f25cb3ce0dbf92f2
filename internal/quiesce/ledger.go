package quiesce

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"farside/internal/dr"
)

// The ledger says what a session may have frozen. It is for the one case in which
// neither the agent nor its watchdog can thaw: both were killed at the same moment.
// Then the next agent does. It lies in memory (/run), so a boot forgets it.

// ledgerEntry is a file system in the ledger.
type ledgerEntry struct {
	Mount string `json:"mount"`
	ID    string `json:"id"` // of the mount, as in mountinfo: the path may mean another one by then
}

// keepLedger writes what is about to be frozen to a file; "" writes nothing.
func keepLedger(file string, slots []*slot) error {
	if file == "" {
		return nil
	}
	var all []ledgerEntry
	for _, sl := range slots {
		for _, m := range sl.FileSystem().mounts {
			all = append(all, ledgerEntry{m.path, m.id})
		}
	}
	text, err := json.Marshal(all)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(file), 0o700)
	}
	if err == nil {
		err = os.WriteFile(file, text, 0o600)
	}
	if err != nil {
		return fmt.Errorf("note what is about to be frozen: %w", err)
	}
	return nil
}

// maxLedger bounds the size of a ledger, in bytes.
const maxLedger = 1 << 20

// ThawLeft thaws what a ledger says that an earlier process left frozen, and returns where that is
// mounted. It is to be called before anything that may write to disk. Errors wrap
// dr.ErrCorrupt if the ledger can't be read.
func ThawLeft(file string) ([]string, error) {
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var text []byte
	if err == nil && info.Size() <= maxLedger {
		text, err = os.ReadFile(file)
	}
	if err != nil {
		return nil, fmt.Errorf("thaw what was left frozen: %w", err)
	}
	left, err := parseLedger(text)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("thaw what was left frozen: %w", err), os.Remove(file))
	}
	var thawed []string
	for _, e := range left {
		if thawMount(e) {
			thawed = append(thawed, e.Mount)
		}
	}
	return thawed, os.Remove(file)
}

// parseLedger reads a ledger.
func parseLedger(text []byte) ([]ledgerEntry, error) {
	var all []ledgerEntry
	if err := json.Unmarshal(text, &all); err != nil {
		return nil, fmt.Errorf("read ledger: %w: %w", dr.ErrCorrupt, err)
	}
	for _, e := range all {
		if !filepath.IsAbs(e.Mount) || e.ID == "" {
			return nil, fmt.Errorf("read ledger: entry %+v: %w", e, dr.ErrCorrupt)
		}
	}
	return all, nil
}
