//go:build linux && amd64

package ebpf

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"farside/internal/dr"
)

// addresses say where this kernel keeps memory: the page structure of frame n is
// at vmemmap + n*pageStruct, its bytes at direct + n*4096. Both bases are random
// for each boot and have no symbols on most kernels, so they are measured.
type addresses struct {
	vmemmap, direct uint64
	pageStruct      uint32
}

const (
	pageSize  = 4096
	tokenSize = 16

	// Where the direct map may begin: its usual place, then every GiB of the
	// room in which the kernel places it at random (4-level and 5-level paging).
	directStep   = 1 << 30
	directFirst4 = 0xffff888000000000
	directCount4 = 1 << 16
	directFirst5 = 0xff11000000000000
	directCount5 = 1 << 25

	calibrationRounds = 4
)

// sighting mirrors struct sighting of bpf/calibrate.c.
type sighting struct {
	Sector, Page  uint64
	Offset, Count uint32
}

// search mirrors struct search.
type search struct {
	Start, Step uint64
	Token       [tokenSize]byte
	Found       uint64
	Count, Pad  uint32
}

// calibrator is the loaded programs and the device it reads from.
type calibrator struct {
	objs calibrationObjects
	dev  *device
	page uint64 // sizeof(struct page)
}

// calibrate measures the addresses by reads from dev. An error says what is
// missing.
func calibrate(dev *device, kernel *btf.Spec) (addresses, error) {
	var page *btf.Struct
	if err := kernel.TypeByName("page", &page); err != nil {
		return addresses{}, fmt.Errorf("size of a page structure: %w", err)
	}
	if os.Getpagesize() != pageSize {
		return addresses{}, fmt.Errorf("pages of %d bytes: %w", os.Getpagesize(), dr.ErrUnsupported)
	}
	spec, err := loadCalibration()
	if err != nil {
		return addresses{}, err
	}
	if err := spec.Variables["want_dev"].Set(dev.dev); err != nil {
		return addresses{}, err
	}
	c := &calibrator{dev: dev, page: uint64(page.Size)}
	if err := spec.LoadAndAssign(&c.objs, &ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{KernelTypes: kernel}}); err != nil {
		return addresses{}, fmt.Errorf("load: %w", err)
	}
	defer c.objs.Close()
	tp, err := link.AttachTracing(link.TracingOptions{Program: c.objs.See})
	if err != nil {
		return addresses{}, fmt.Errorf("attach: %w", err)
	}
	defer tp.Close()
	return c.run()
}

// run measures several times: a page may move between two looks, and one agreement
// may be chance.
func (c *calibrator) run() (addresses, error) {
	a := addresses{pageStruct: uint32(c.page)}
	agreed := 0
	var last error
	for range 5 * calibrationRounds {
		b, err := c.once(a.direct)
		switch {
		case err != nil:
			last = err
		case agreed == 0 || b == a:
			a = b
			if agreed++; agreed == calibrationRounds {
				return a, nil
			}
		default:
			last = fmt.Errorf("page structures are not in one array: %w", dr.ErrUnsupported)
			agreed = 0
		}
	}
	return a, last
}

// once makes a page with a token, lets the kernel read a block into it and sees
// which page structure it used. If direct is not 0 the direct map is expected
// there.
func (c *calibrator) once(direct uint64) (addresses, error) {
	a := addresses{pageStruct: uint32(c.page)}
	mem, err := unix.Mmap(-1, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE)
	if err != nil {
		return a, err
	}
	defer unix.Munmap(mem)
	if err := unix.Mlock(mem); err != nil {
		return a, fmt.Errorf("lock a page: %w", err)
	}
	if c.dev.disk.Size < pageSize {
		return a, fmt.Errorf("disk of %d bytes: %w", c.dev.disk.Size, dr.ErrUnsupported)
	}
	off := int64(randomNumber()%uint64(c.dev.disk.Size/pageSize)) * pageSize
	before := sighting{Sector: c.dev.start + uint64(off)/dr.SectorSize}
	if err := c.objs.Sightings.Put(uint32(0), before); err != nil {
		return a, err
	}
	if _, err := c.dev.pread(mem, off); err != nil {
		return a, fmt.Errorf("read a block: %w", err)
	}
	var seen sighting
	if err := c.objs.Sightings.Lookup(uint32(0), &seen); err != nil {
		return a, err
	}
	if seen.Count == 0 {
		return a, fmt.Errorf("the programs did not see a read of %s: %w", c.dev.disk.Path, dr.ErrUnsupported)
	}
	rand.Read(mem[:tokenSize])
	frame, err := frameOf(mem)
	if err != nil {
		return a, err
	}
	a.vmemmap = seen.Page - frame*c.page
	a.direct, err = c.findDirect(mem[:tokenSize], frame<<12, direct)
	runtime.KeepAlive(mem)
	return a, err
}

func randomNumber() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return binary.LittleEndian.Uint64(b[:])
}

// frameOf returns the number of the page frame behind mem.
func frameOf(mem []byte) (uint64, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var entry [8]byte
	if _, err := f.ReadAt(entry[:], int64(addressOf(mem)/pageSize*8)); err != nil {
		return 0, fmt.Errorf("read page map: %w", err)
	}
	frame := binary.LittleEndian.Uint64(entry[:]) & (1<<55 - 1)
	if frame == 0 {
		return 0, fmt.Errorf("page map shows no frame numbers (needs CAP_SYS_ADMIN): %w", dr.ErrDenied)
	}
	return frame, nil
}

// findDirect looks for a token at physical address phys of the direct map, which
// begins at guess if that is not 0.
func (c *calibrator) findDirect(token []byte, phys, guess uint64) (uint64, error) {
	s := search{Step: directStep, Count: 1, Start: guess + phys}
	copy(s.Token[:], token)
	if guess != 0 {
		return c.look(s, phys)
	}
	s.Start, s.Count = directFirst4+phys, directCount4
	if fiveLevelPaging() {
		s.Start, s.Count = directFirst5+phys, directCount5
	}
	const step = 1 << 20 // a program must not run for ever
	for left := s.Count; left > 0; left -= min(left, step) {
		s.Count = min(left, step)
		if base, err := c.look(s, phys); err == nil || !errors.Is(err, dr.ErrUnsupported) {
			return base, err
		}
		s.Start += uint64(s.Count) * directStep
	}
	return 0, fmt.Errorf("the kernel's map of memory was not found (lockdown?): %w", dr.ErrUnsupported)
}

func (c *calibrator) look(s search, phys uint64) (uint64, error) {
	var out search
	_, err := c.objs.FindToken.Run(&ebpf.RunOptions{Context: s, ContextOut: &out})
	if err != nil {
		return 0, fmt.Errorf("run search: %w", err)
	}
	if out.Found == 0 {
		return 0, fmt.Errorf("a page is not where it should be: %w", dr.ErrUnsupported)
	}
	return out.Found - phys, nil
}

// fiveLevelPaging reports whether addresses have 57 bits.
func fiveLevelPaging() bool {
	text, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && bytes.Contains(text, []byte(" la57 "))
}
