package agent

import (
	"errors"
	"fmt"
	"net"
	"os"

	"farside/internal/capture"
	"farside/internal/capture/qemu"
	"farside/internal/capture/tap"
	"farside/internal/dr"
)

// The capture drivers by name.
const (
	driverAuto = "auto"
	driverEBPF = "ebpf"
	driverTap  = "tap"
)

// opened is a Source that a stream may use.
type opened struct {
	src    capture.Source
	driver string
	used   bool  // another stream took events of it over before
	remark error // why it is not as good as it could be
}

// opener opens the Source of some disks; driver and ring override the
// configuration unless they are zero.
type opener func(disks []capture.Disk, driver string, ring int64) (opened, error)

// drivers opens Sources as the configuration says. The tap is open all the
// time, because its writers need their disks also while nothing is replicated.
type drivers struct {
	conf    CaptureConfig
	pins    string      // where this machine's capture is pinned; "" if it is not
	tap     *tap.Opened // nil: not set up
	tapUsed bool
	guest   *qemu.Guest // nil: not set up
}

// openDrivers sets up what must run all the time.
func openDrivers(c CaptureConfig, machine dr.MachineID) (*drivers, error) {
	guest, err := openGuest(c.QEMU)
	if err != nil {
		return nil, err
	}
	d := &drivers{conf: c, guest: guest, pins: c.pins(machine)}
	if !c.Tap.set() {
		return d, nil
	}
	if err := os.Remove(c.Tap.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove old tap socket: %w", err)
	}
	l, err := net.Listen("unix", c.Tap.Socket)
	if err != nil {
		return nil, fmt.Errorf("listen for writers of the tap: %w", err)
	}
	o := tap.Options{Listen: l, Queue: int64(c.Ring), ExportNames: map[dr.DiskID]string{}}
	for i, t := range c.Tap.Disks {
		o.Disks = append(o.Disks, capture.Disk{ID: tapID(i), Path: t.Path})
		o.ExportNames[tapID(i)] = t.Name
	}
	if d.tap, err = tap.Open(o); err != nil {
		return nil, fmt.Errorf("open tap: %w", err)
	}
	return d, nil
}

// tapID is what the i-th disk of the tap is called inside of it: its number in
// the machine is not known before it is protected, and may change.
func tapID(i int) dr.DiskID { return dr.DiskID(i + 1) }

// Close ends what runs all the time.
func (d *drivers) Close() (err error) {
	if d.guest != nil {
		err = d.guest.Close()
	}
	if d.tap != nil {
		err = errors.Join(err, d.tap.Close())
	}
	return err
}

// open is the opener.
func (d *drivers) open(disks []capture.Disk, driver string, ring int64) (opened, error) {
	if driver == "" {
		driver = d.conf.Driver
	}
	if ring == 0 {
		ring = int64(d.conf.Ring)
	}
	if driver == driverAuto {
		driver = d.choose(disks)
	}
	if driver != driverEBPF {
		if err := d.release(); err != nil {
			return opened{}, fmt.Errorf("end the capture with ebpf: %w", err)
		}
	}
	switch driver {
	case driverEBPF:
		src, why, err := d.openEBPF(disks, ring)
		if err != nil {
			return opened{}, fmt.Errorf("capture with ebpf: %w", hint(err))
		}
		return checked(opened{src: src, driver: driver, remark: why}, disks)
	case driverTap:
		src, err := d.openTap(disks)
		if err != nil {
			return opened{}, fmt.Errorf("capture with the tap: %w", err)
		}
		used := d.tapUsed
		d.tapUsed = true
		return checked(opened{src: src, driver: driver, used: used}, disks)
	case driverQEMU:
		src, err := d.openQEMU(disks, ring)
		if err != nil {
			return opened{}, fmt.Errorf("capture a guest of qemu: %w", hint(err))
		}
		return checked(opened{src: src, driver: driver}, disks)
	case driverScan:
		src, err := d.openScan(disks)
		if err != nil {
			return opened{}, fmt.Errorf("capture by scanning: %w", err)
		}
		return checked(opened{src: src, driver: driver}, disks)
	}
	return opened{}, hint(fmt.Errorf("capture driver %q: %w", driver, dr.ErrUnsupported))
}

// choose returns the driver that fits the disks.
func (d *drivers) choose(disks []capture.Disk) string {
	switch {
	case d.tapped(disks):
		return driverTap
	case ofGuest(disks):
		return driverQEMU
	}
	return byPlatform()
}

// tapped reports whether all disks are behind the tap.
func (d *drivers) tapped(disks []capture.Disk) bool {
	for _, x := range disks {
		if d.tapIndex(x.Path) < 0 {
			return false
		}
	}
	return len(disks) > 0
}

func (d *drivers) tapIndex(path string) int {
	if d.tap != nil {
		for i, t := range d.conf.Tap.Disks {
			if t.Path == path {
				return i
			}
		}
	}
	return -1
}

func (d *drivers) openTap(disks []capture.Disk) (capture.Source, error) {
	if d.tap == nil {
		return nil, fmt.Errorf("it is not set up in the configuration: %w", dr.ErrInvalid)
	}
	names := make(map[dr.DiskID]dr.DiskID)
	for _, x := range disks {
		at := d.tapIndex(x.Path)
		if at < 0 {
			return nil, fmt.Errorf("%s is not behind it: %w", x.Path, dr.ErrNotFound)
		}
		names[tapID(at)] = x.ID
	}
	return renumber(d.tap, names), nil
}

func sizeOf(disks []capture.Disk, id dr.DiskID) int64 {
	for _, d := range disks {
		if d.ID == id {
			return d.Size
		}
	}
	return 0
}

// checked closes o again if its disks are not as large as they are known to be.
func checked(o opened, want []capture.Disk) (opened, error) {
	for _, w := range want {
		if size := sizeOf(o.src.Disks(), w.ID); w.Size != 0 && size != w.Size {
			err := fmt.Errorf("%s has %d bytes, not %d: protect it anew: %w", w.Path, size, w.Size, dr.ErrInvalid)
			return opened{}, errors.Join(err, o.src.Close())
		}
	}
	return o, nil
}
