package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/qemu"
	scandriver "farside/internal/capture/scan"
	"farside/internal/dr"
)

// Drivers that need no hook in this machine's kernel.
const (
	driverQEMU = "qemu" // captures the disks of a running guest from outside
	driverScan = "scan" // compares from time to time
)

// ScanConfig says how the driver scan works.
type ScanConfig struct {
	// Every is the time between the beginnings of two scans. Default 15 min.
	Every time.Duration `yaml:"every"`
	// Rate bounds what a scan reads per second. Default: no bound.
	Rate dr.Size `yaml:"rate"`
	// Tables is a directory for the hashes of disks of more than 64 GiB. It must not be on a
	// scanned disk. Default: all hashes are in memory.
	Tables string `yaml:"tables"`
}

// minScanEvery keeps a typing mistake from reading disks all the time.
const minScanEvery = time.Second

func (c *ScanConfig) check() error {
	if c.Every != 0 && c.Every < minScanEvery {
		return fmt.Errorf("capture.scan.every: %v, need at least %v: %w", c.Every, minScanEvery, dr.ErrInvalid)
	}
	if c.Rate < 0 {
		return fmt.Errorf("capture.scan.rate: below zero: %w", dr.ErrInvalid)
	}
	return nil
}

func (d *drivers) openScan(disks []capture.Disk) (capture.Source, error) {
	c := d.conf.Scan
	if c.Tables != "" {
		if err := os.MkdirAll(c.Tables, 0o700); err != nil {
			return nil, fmt.Errorf("make directory for scan tables: %w", err)
		}
	}
	src, err := scandriver.Open(disks, scandriver.Options{Every: c.Every, Rate: int64(c.Rate), Dir: c.Tables})
	if err != nil {
		return nil, err
	}
	return src, nil
}

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

// byPlatform is the driver for disks that nothing else says anything about. Where no hook can be had the scan
// is all there is; on Linux it would be a silent step down.
func byPlatform() string {
	if runtime.GOOS == "linux" {
		return driverEBPF
	}
	return driverScan
}

// statNamed returns the size of a file that the configuration names, as of a system whose paths are
// not those of an fs.FS: Windows. ok is false elsewhere.
func statNamed(path string) (size int64, ok bool, err error) {
	if runtime.GOOS != "windows" {
		return 0, false, nil
	}
	size, err = scandriver.Size(path)
	return size, true, err
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

// driversOf returns the drivers that a system has, for people.
func driversOf(goos, goarch string) string {
	switch {
	case goos == "linux" && goarch == "amd64":
		return "ebpf, tap, qemu, scan"
	case goos == "linux":
		return "tap, qemu, scan"
	}
	return "tap, scan"
}

// hint says which drivers there are if err says that one is not.
func hint(err error) error {
	if errors.Is(err, dr.ErrUnsupported) {
		return fmt.Errorf("%w; drivers for %s/%s: %s", err, runtime.GOOS, runtime.GOARCH, driversOf(runtime.GOOS, runtime.GOARCH))
	}
	return err
}
