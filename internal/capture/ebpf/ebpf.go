// Package ebpf captures block writes of whole disks and partitions on a stock
// Linux kernel by programs on the block layer's tracepoints: no kernel module,
// no reboot, no re-mount. docs/capture.md tells how, and what is proven.
//
// Main types: Options and Open, which returns a capture.Source, or a
// capture.Survivor. The programs are
// in bpf/ and come compiled; building Farside needs no clang.
//
// The package does not capture device mapper, MD and zoned devices (it refuses
// them), what bypasses the block layer (SG and NVMe passthrough, DAX), or
// anything before Open. Without Options.Pin it leaves nothing in the kernel: when the
// process ends, the capture ends. With it, the capture goes on until Forget
// or a reboot.
//
// A Source is safe for concurrent use as package capture says. It starts no
// goroutine.
package ebpf

import (
	"fmt"

	"farside/internal/dr"
)

// FileSystem is where BPF objects are pinned on most machines.
const FileSystem = "/sys/fs/bpf"

// MaxDisks is how many disks one Source captures at most.
const MaxDisks = 32

// Options tune a Source. The zero value is good.
type Options struct {
	// RingBytes is the size of the buffer between kernel and agent, a power of
	// two of at least 64 KiB. It is kernel memory that cannot be swapped.
	// Default: 256 MiB, on machines with less than 8 GiB a 32nd of the memory.
	// Writes of more than a quarter of it are not captured but marked.
	RingBytes int64
	// BlockSize is the granularity of the dirty set in bytes, a power of two of
	// at least 512. Default: 4 KiB, more if the dirty set would exceed 8 MiB of
	// memory (which it does beyond 256 GiB of disks).
	BlockSize int64
	// BitmapOnly captures no data: the Source is in bitmap mode for ever and
	// Resume answers dr.ErrUnsupported. For machines where data can't be had,
	// such as under lockdown "confidentiality", and for measuring.
	BitmapOnly bool

	// Pin is a directory on a BPF file system (see MountFileSystem) in which the capture
	// survives this process; it is made if need be and belongs to one capture.
	// The Source is a capture.Survivor then. Default: none, nothing survives.
	Pin string
	// Hold leaves events in the buffer until Survivor.Release. With Pin only.
	Hold bool
	// Memory is the size of Survivor.Memory in bytes, at most 64 MiB. With Pin only.
	Memory int
}

const (
	minRing      = 64 << 10
	defaultRing  = 256 << 20
	minBlock     = 4096
	maxBitmap    = 8 << 20 // bytes, for the default block size
	smallMachine = 8 << 30
	maxMemory    = 64 << 20
)

// withDefaults fills in and checks o for disks of total bytes on a machine with
// that much memory.
func (o Options) withDefaults(total, memory int64) (Options, error) {
	if o.RingBytes == 0 {
		o.RingBytes = defaultRing
		for memory < smallMachine && o.RingBytes > memory/32 && o.RingBytes > minRing {
			o.RingBytes /= 2
		}
	}
	if o.RingBytes < minRing || o.RingBytes > 1<<30 || o.RingBytes&(o.RingBytes-1) != 0 {
		return o, fmt.Errorf("ring of %d bytes: want a power of two from 64 KiB to 1 GiB: %w", o.RingBytes, dr.ErrInvalid)
	}
	if o.BlockSize == 0 {
		o.BlockSize = minBlock
		for total/o.BlockSize/8 > maxBitmap {
			o.BlockSize *= 2
		}
	}
	if o.BlockSize < dr.SectorSize || o.BlockSize&(o.BlockSize-1) != 0 {
		return o, fmt.Errorf("block size %d: want a power of two of at least %d: %w", o.BlockSize, dr.SectorSize, dr.ErrInvalid)
	}
	if o.Pin == "" && (o.Hold || o.Memory != 0) || o.Memory < 0 || o.Memory > maxMemory {
		return o, fmt.Errorf("hold %v, memory of %d bytes, pins %q: need pins and at most 64 MiB: %w", o.Hold, o.Memory, o.Pin, dr.ErrInvalid)
	}
	return o, nil
}
