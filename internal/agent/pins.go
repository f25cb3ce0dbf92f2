package agent

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/ebpf"
	"farside/internal/dr"
	"farside/internal/transport"
)

const (
	pinOff      = "off"
	defaultPins = ebpf.FileSystem + "/farside"
)

// pins returns the directory in which a machine's capture is pinned, "" if it is not.
func (c *CaptureConfig) pins(machine dr.MachineID) string {
	if c.Pin == pinOff {
		return ""
	}
	return filepath.Join(cmp.Or(c.Pin, defaultPins), machine.String())
}

// Release takes the capture that goes on without the agent out of the kernel, and reports
// whether there was one: for a machine from which the agent is removed. The error wraps
// dr.ErrExists while the agent runs, dr.ErrNotFound if the node has not joined, and dr.ErrInvalid
// if it joined as something else.
func Release(c Config) (removed bool, err error) {
	id, err := transport.LoadIdentity(c.Data, time.Now)
	if err != nil {
		return false, fmt.Errorf("release capture: %w", err)
	}
	if role := id.Peer().Role; role != transport.RoleAgent {
		return false, fmt.Errorf("release capture: %s is the data directory of a %s: %w", c.Data, role, dr.ErrInvalid)
	}
	d := &drivers{pins: c.Capture.pins(id.Peer().Machine)}
	if d.pins != "" {
		_, err = os.Lstat(d.pins)
		removed = err == nil
	}
	if err := d.release(); err != nil {
		return false, fmt.Errorf("release capture: %w", err)
	}
	return removed, nil
}

// openEBPF opens the capture that goes on without the agent; where that can't be had, one
// that ends with it, and says why.
func (d *drivers) openEBPF(disks []capture.Disk, ring int64) (src capture.Source, why, err error) {
	if d.pins == "" {
		src, err = ebpf.Open(disks, ebpf.Options{RingBytes: ring})
		return src, nil, err
	}
	why = d.preparePins()
	if why == nil {
		src, err = ebpf.Open(disks, ebpf.Options{RingBytes: ring, Pin: d.pins, Hold: true, Memory: ledgerBytes})
		if err == nil || !errors.Is(err, dr.ErrUnsupported) && !errors.Is(err, dr.ErrDenied) {
			return src, nil, err
		}
		why = err
	}
	src, err = ebpf.Open(disks, ebpf.Options{RingBytes: ring})
	if err != nil {
		return nil, nil, errors.Join(err, why)
	}
	return src, fmt.Errorf("the capture ends with the agent, and the disks are compared after each restart: %w", why), nil
}

// preparePins makes the directory in which this machine's capture is pinned.
func (d *drivers) preparePins() error {
	parent := filepath.Dir(d.pins)
	if filepath.Dir(parent) == ebpf.FileSystem {
		if err := ebpf.MountFileSystem(ebpf.FileSystem); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return fmt.Errorf("make directory for pins: %w", err)
	}
	return nil
}

// release takes the capture out of the kernel: nothing is to be replicated any more.
func (d *drivers) release() error {
	if d.pins == "" {
		return nil
	}
	return ebpf.Remove(d.pins)
}
