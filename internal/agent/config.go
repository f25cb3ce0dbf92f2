package agent

import (
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"time"

	"farside/internal/dr"
	"farside/internal/fsmap"
	"farside/internal/quiesce"
	"farside/internal/rolefile"
)

// Config is the agent's configuration file. What is replicated is not in it:
// the configuration server says that.
type Config struct {
	// Data is the directory that joining made: the agent's identity, and what
	// the configuration server said last.
	Data string `yaml:"data"`
	// Memory bounds what the replication holds, most of it frames that wait for the process
	// server. At least 32 MiB; default 64 MiB.
	Memory dr.Size `yaml:"memory"`
	// Capture says how writes are captured.
	Capture CaptureConfig `yaml:"capture"`
	// LoopDevices also offers loop devices for protection.
	LoopDevices bool `yaml:"loop_devices"`
	// Disks are paths that are offered for protection besides those found.
	Disks []string `yaml:"disks"`
	// Compare says how disks are compared with the far side.
	Compare CompareConfig `yaml:"compare"`
	// Points says how consistency points are made.
	Points PointsConfig `yaml:"points"`
	// Version is the program's, for reports; the program sets it.
	Version string `yaml:"-"`
}

// CaptureConfig chooses and sets the capture driver.
type CaptureConfig struct {
	// Driver is "ebpf", "tap", "qemu", "scan", or "auto": the tap for disks behind it, qemu
	// for those of the guest, ebpf for all others. Default auto.
	Driver string `yaml:"driver"`
	// Ring is the size of the buffer between the kernel, or the tap, and the
	// agent. Default: the driver's.
	Ring dr.Size `yaml:"ring"`
	// Pin is a directory on a BPF file system in which the driver ebpf keeps the capture while the agent
	// does not run: it goes on capturing, and the next agent goes on where this one stood. Default
	// /sys/fs/bpf/farside; "off" ends the capture with the agent.
	Pin string    `yaml:"pin"`
	Tap TapConfig `yaml:"tap"`
	// QEMU is the guest whose disks are captured from outside.
	QEMU QEMUConfig `yaml:"qemu"`
	Scan ScanConfig `yaml:"scan"`
}

// CompareConfig says how disks are compared with what the far side holds.
type CompareConfig struct {
	// Rate bounds what comparisons read, in bytes a second; 0, the default, sets no bound.
	// Captured writes come first in any case.
	Rate dr.Size `yaml:"rate"`
	// SkipFree names kinds of file systems, ext4 and xfs, whose free blocks are neither compared
	// nor read for the initial replication. Default: none; docs/used-blocks.md says what is given up.
	SkipFree []string `yaml:"skip_free"`
	// Every is how long a pass of the background comparison over all disks takes, more or less; at least
	// 256 KiB are read a second. 0 means that there is none. Default: a week.
	Every time.Duration `yaml:"every"`
}

func (c *CompareConfig) check() error {
	if c.Every < 0 {
		return fmt.Errorf("compare.every of %v: give a duration such as 168h, or 0 for none: %w", c.Every, dr.ErrInvalid)
	}
	for i, s := range c.SkipFree {
		if _, err := fsmap.ParseKind(s); err != nil {
			return fmt.Errorf("compare.skip_free[%d]: %w", i, err)
		}
	}
	return nil
}

// kinds returns SkipFree after check.
func (c *CompareConfig) kinds() (out []fsmap.Kind) {
	for _, s := range c.SkipFree {
		out = append(out, fsmap.Kind(s))
	}
	return out
}

// PointsConfig says how consistency points are made on this machine. When they are made
// is not in it.
type PointsConfig struct {
	// Hooks is the directory that holds pre-freeze.d and post-thaw.d. Default /etc/farside.
	Hooks string `yaml:"hooks"`
	// Run is where each run of the hooks gets a directory of its own, and where it is noted what
	// is frozen. It must not lie on a protected disk. Default /run/farside/points.
	Run string `yaml:"run"`
	// HookTimeout bounds one hook, HooksTimeout all of one directory. Defaults 20s and 60s.
	HookTimeout  time.Duration `yaml:"hook_timeout"`
	HooksTimeout time.Duration `yaml:"hooks_timeout"`
}

func (p *PointsConfig) check() error {
	for _, d := range []string{p.Hooks, p.Run} {
		if !filepath.IsAbs(d) && !path.IsAbs(d) { // Windows, which has no hooks, doesn't call the defaults absolute
			return fmt.Errorf("points: %q is not an absolute path: %w", d, dr.ErrInvalid)
		}
	}
	if p.HookTimeout <= 0 || p.HooksTimeout < p.HookTimeout || p.HooksTimeout > maxHooksTimeout {
		return fmt.Errorf("points: hook_timeout %s and hooks_timeout %s: want 0 < the first ≤ the second ≤ %s: %w",
			p.HookTimeout, p.HooksTimeout, maxHooksTimeout, dr.ErrInvalid)
	}
	return nil
}

// runDir is where the agent of a machine keeps what points need while they are made.
func (p *PointsConfig) runDir(m dr.MachineID) string { return filepath.Join(p.Run, m.String()) }

// ledger is the file that says what is frozen.
func (p *PointsConfig) ledger(m dr.MachineID) string { return filepath.Join(p.runDir(m), "frozen") }

// hooks returns the hooks of a machine whose agent keeps its data in a directory.
func (p *PointsConfig) hooks(data string, m dr.MachineID) *quiesce.Hooks {
	return &quiesce.Hooks{Dir: p.Hooks, Run: p.runDir(m), Logs: filepath.Join(data, "hooks"), Each: p.HookTimeout, Total: p.HooksTimeout}
}

// TapConfig sets the tap up: an NBD server in front of files or devices.
type TapConfig struct {
	Socket string    `yaml:"socket"` // Unix socket on which writers connect
	Disks  []TapDisk `yaml:"disks"`
}

// TapDisk is one export of the tap.
type TapDisk struct {
	Name string `yaml:"name"` // of the export
	Path string `yaml:"path"` // of the file or device behind it
}

const (
	minMemory     = 32 << 20
	defaultMemory = 64 << 20
	defaultEvery  = 7 * 24 * time.Hour // of a pass of the background comparison

	maxHooksTimeout = 10 * time.Minute
)

// LoadConfig reads the configuration file. Errors wrap dr.ErrInvalid or are those
// of reading the file.
func LoadConfig(path string) (Config, error) { return rolefile.Load(path, ParseConfig) }

// ParseConfig reads a configuration and fills the defaults in. Errors wrap
// dr.ErrInvalid.
func ParseConfig(b []byte) (Config, error) {
	c := Config{Memory: defaultMemory, Compare: CompareConfig{Every: defaultEvery}, Capture: CaptureConfig{Driver: driverAuto}, Points: PointsConfig{
		Hooks: "/etc/farside", Run: "/run/farside/points", HookTimeout: 20 * time.Second, HooksTimeout: time.Minute,
	}}
	if err := rolefile.Decode(b, &c); err != nil {
		return Config{}, err
	}
	return c, c.check()
}

func (c *Config) check() error {
	switch {
	case c.Data == "":
		return fmt.Errorf("data: missing: %w", dr.ErrInvalid)
	case c.Memory < minMemory:
		return fmt.Errorf("memory: %d bytes, need at least %d: %w", c.Memory, minMemory, dr.ErrInvalid)
	}
	switch c.Capture.Driver {
	case driverAuto, driverEBPF, driverScan:
	case driverTap:
		if !c.Capture.Tap.set() {
			return fmt.Errorf("capture.tap: the driver is tap, but it has no socket or no disks: %w", dr.ErrInvalid)
		}
	case driverQEMU:
		if !c.Capture.QEMU.set() {
			return fmt.Errorf("capture.qemu: the driver is qemu, but it has no monitor: %w", dr.ErrInvalid)
		}
	default:
		return fmt.Errorf("capture.driver: %q is none of auto, ebpf, tap, qemu, scan: %w", c.Capture.Driver, dr.ErrInvalid)
	}
	if err := errors.Join(c.Capture.QEMU.check(), c.Capture.Scan.check()); err != nil {
		return err
	}
	return errors.Join(c.Capture.Tap.check(), c.Points.check(), c.Compare.check())
}

func (t *TapConfig) set() bool { return t.Socket != "" && len(t.Disks) > 0 }

func (t *TapConfig) check() error {
	if (t.Socket == "") != (len(t.Disks) == 0) {
		return fmt.Errorf("capture.tap: socket and disks go together: %w", dr.ErrInvalid)
	}
	seen := make(map[string]bool)
	for i, d := range t.Disks {
		if d.Name == "" || d.Path == "" {
			return fmt.Errorf("capture.tap.disks[%d]: name and path are needed: %w", i, dr.ErrInvalid)
		}
		if seen["n"+d.Name] || seen["p"+d.Path] {
			return fmt.Errorf("capture.tap.disks[%d]: %s or %s is there twice: %w", i, d.Name, d.Path, dr.ErrInvalid)
		}
		seen["n"+d.Name], seen["p"+d.Path] = true, true
	}
	return nil
}
