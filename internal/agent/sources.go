package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/qemu"
	"farside/internal/dr"
)

// driverQEMU captures the disks of a running guest from outside.
const driverQEMU = "qemu"

// QEMUConfig says which guest is captured from outside.
type QEMUConfig struct {
	// Monitor is the Unix socket of a QMP monitor of the guest that nobody else uses.
	Monitor string `yaml:"monitor"`
	// Directory for the sockets between QEMU and the agent; both need access.
	Directory string `yaml:"directory"`
	// Disks are names of block devices or of block nodes of the guest.
	Disks []string `yaml:"disks"`
}

func (q *QEMUConfig) set() bool { return q.Monitor != "" }

func (q *QEMUConfig) check() error {
	if all, none := q.Monitor != "" && q.Directory != "" && len(q.Disks) > 0, q.Monitor == "" && q.Directory == "" && len(q.Disks) == 0; !all && !none {
		return fmt.Errorf("capture.qemu: monitor, directory and disks go together: %w", dr.ErrInvalid)
	}
	seen := make(map[string]bool)
	for i, d := range q.Disks {
		if d == "" || seen[d] {
			return fmt.Errorf("capture.qemu.disks[%d]: %q is empty or there twice: %w", i, d, dr.ErrInvalid)
		}
		seen[d] = true
	}
	return nil
}

// openGuest sets up what is known of the guest; QEMU need not run yet.
func openGuest(c QEMUConfig) (*qemu.Guest, error) {
	if !c.set() {
		return nil, nil //nolint:nilnil // no guest is configured
	}
	if err := os.MkdirAll(c.Directory, 0o700); err != nil {
		return nil, fmt.Errorf("make directory for the guest's sockets: %w", err)
	}
	return qemu.New(qemu.Options{Monitor: c.Monitor, Dir: c.Directory, Disks: c.Disks}), nil
}

// ofGuest reports whether all disks are the guest's.
func ofGuest(disks []capture.Disk) bool {
	for _, d := range disks {
		if !strings.HasPrefix(d.Path, qemu.PathPrefix) {
			return false
		}
	}
	return len(disks) > 0
}

func (d *drivers) openQEMU(disks []capture.Disk, ring int64) (capture.Source, error) {
	if d.guest == nil {
		return nil, fmt.Errorf("it is not set up in the configuration: %w", dr.ErrInvalid)
	}
	src, err := d.guest.Open(context.Background(), disks, ring)
	if err != nil {
		return nil, err
	}
	return src, nil
}

// guestTimeout bounds how long a report waits for QEMU.
const guestTimeout = 2 * time.Second

// offered returns what may be protected besides block devices and files.
func (d *drivers) offered() []found {
	if d.guest == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), guestTimeout)
	defer cancel()
	disks, err := d.guest.Disks(ctx)
	var out []found
	for _, x := range disks {
		out = append(out, found{path: x.Path, size: x.Size, kind: driverQEMU})
	}
	if err == nil {
		return out
	}
	why := "the guest's QEMU can't be asked: " + err.Error()
	if errors.Is(err, dr.ErrNotFound) {
		why = "the guest has no such disk"
	}
	for _, name := range d.conf.QEMU.Disks {
		out = append(out, found{path: qemu.PathPrefix + name, kind: driverQEMU, why: why})
	}
	return out
}
