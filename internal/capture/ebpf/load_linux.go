//go:build linux && amd64

package ebpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"farside/internal/capture"
	"farside/internal/dr"
)

// watch mirrors struct watch of bpf/state.h.
type watch struct {
	Start, End uint64
	Word       uint64
	Dev, Pad   uint32
}

// flight mirrors struct flight.
type flight struct {
	Bio, From, To, Left, Time uint64
	State, Dev                uint32
	_                         [2]uint64
}

const (
	maxFlying  = 1 << 15
	flightBusy = 1 // as Bio: it is being filled
)

// counters mirrors struct counters.
type counters struct {
	Writes, Bytes, Flushes, Marked, Seen, SeenBytes, ForeignBytes uint64
}

// Offsets in struct control.
const (
	controlState       = 0
	controlSettled     = 4
	controlUntrackedAt = 8
	controlUnreadable  = 16
	controlFailed      = 24
	controlLost        = 32
	controlLate        = 40
	controlStrangers   = 48
	controlSize        = 56
)

// loaded is what is in the kernel for one Source, and its mapped memory.
type loaded struct {
	objs    programObjects
	links   []link.Link
	control []byte
	bitmap  []byte
	flying  []byte
	rings   [][]byte
	ring    ring
	notes   *notes

	// Only of what is pinned.
	notesMap *ebpf.Map
	notesMem []byte
}

// kernelTypes reads the kernel's description of itself and checks what the programs
// take for granted.
func kernelTypes() (*btf.Spec, error) {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("kernel without type information (CONFIG_DEBUG_INFO_BTF): %w: %w", err, dr.ErrUnsupported)
	}
	var ops *btf.Enum
	if kernel.TypeByName("req_op", &ops) != nil && kernel.TypeByName("req_opf", &ops) != nil {
		return nil, fmt.Errorf("kernel does not name its request operations: %w", dr.ErrUnsupported)
	}
	want := map[string]uint64{"REQ_OP_WRITE": 1, "REQ_OP_FLUSH": 2, "REQ_OP_DISCARD": 3, "REQ_OP_SECURE_ERASE": 5, "REQ_OP_WRITE_ZEROES": 9}
	for _, v := range ops.Values {
		if n, ok := want[v.Name]; ok && n == v.Value {
			delete(want, v.Name)
		}
	}
	if len(want) > 0 {
		return nil, fmt.Errorf("kernel has other request operations, not %v: %w", want, dr.ErrUnsupported)
	}
	var vec *btf.Struct
	if err := kernel.TypeByName("bio_vec", &vec); err != nil {
		return nil, fmt.Errorf("kernel's bio_vec: %w: %w", err, dr.ErrUnsupported)
	}
	if len(vec.Members) != 3 || vec.Size != 16 || vec.Members[1].Offset.Bytes() != 8 || vec.Members[2].Offset.Bytes() != 12 {
		return nil, fmt.Errorf("kernel has another bio_vec: %w", dr.ErrUnsupported)
	}
	return kernel, nil
}

// load brings the programs into the kernel, not attached yet.
func load(kernel *btf.Spec, devs []*device, o Options, at addresses) (*loaded, error) {
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, explain("raise memory limit", err)
	}
	spec, err := loadProgram()
	if err != nil {
		return nil, fmt.Errorf("read programs: %w", err)
	}
	disks := disksOf(devs)
	first, words := capture.BitmapLayout(disks, o.BlockSize)
	var watches [MaxDisks]watch
	for i, d := range devs {
		watches[i] = watch{Start: d.start, End: d.end(), Word: uint64(first[i]), Dev: d.dev}
	}
	spec.Maps["bitmap"].MaxEntries = uint32(words)
	spec.Maps["ring"].MaxEntries = uint32(o.RingBytes)
	shift := uint32(0)
	for dr.SectorSize<<shift < o.BlockSize {
		shift++
	}
	for name, value := range map[string]any{
		"watches": watches, "watch_count": uint32(len(devs)), "block_shift": shift, "max_bio": uint32(o.RingBytes / 4),
		"page_struct": max(at.pageStruct, 1), "vmemmap_base": at.vmemmap, "direct_base": at.direct,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
	}
	l := &loaded{}
	if err := spec.LoadAndAssign(&l.objs, &ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{KernelTypes: kernel}}); err != nil {
		return nil, explain("load programs", err)
	}
	if err := l.mapMemory(words, o.RingBytes); err != nil {
		l.close()
		return nil, fmt.Errorf("map memory: %w", err)
	}
	if err := l.takeNotes(o); err != nil {
		l.close()
		return nil, err
	}
	if err := l.notes.begin(metaOf(devs, o)); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// takeNotes makes the notes: in memory that can be pinned if the capture is to survive.
func (l *loaded) takeNotes(o Options) (err error) {
	if o.Pin == "" {
		l.notes = new(notes)
		return nil
	}
	if l.notesMap, err = newMemory("notes", notesSize); err != nil {
		return err
	}
	if l.notesMem, err = unix.Mmap(l.notesMap.FD(), 0, notesSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map notes: %w", err)
	}
	l.notes = notesIn(l.notesMem)
	return nil
}

// mmapable is BPF_F_MMAPABLE.
const mmapable = 1 << 10

// newMemory makes a map that is nothing but memory of at least size bytes.
func newMemory(name string, size int) (*ebpf.Map, error) {
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: name, Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: uint32((size + 7) / 8), Flags: mmapable,
	})
	if err != nil {
		return nil, explain("make memory for "+name, err)
	}
	return m, nil
}

// explain adds to an error of the kernel's BPF side what can be done about it.
func explain(what string, err error) error {
	kind := dr.ErrUnsupported
	switch {
	case errors.Is(err, fs.ErrPermission):
		err = fmt.Errorf("%w (needs root, or CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN)", err)
		kind = dr.ErrDenied
	case errors.Is(err, unix.ENOMEM):
		kind = dr.ErrFull
	}
	if text, e := os.ReadFile("/sys/kernel/security/lockdown"); e == nil {
		err = fmt.Errorf("%w (lockdown: %.60s)", err, text)
	}
	return fmt.Errorf("%s: %w: %w", what, err, kind)
}

func (l *loaded) mapMemory(words int, ringBytes int64) (err error) {
	const rw = unix.PROT_READ | unix.PROT_WRITE
	if l.control, err = unix.Mmap(l.objs.Control.FD(), 0, pageSize, rw, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("control: %w", err)
	}
	size := (words*8 + pageSize - 1) &^ (pageSize - 1)
	if l.bitmap, err = unix.Mmap(l.objs.Bitmap.FD(), 0, size, rw, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("bitmap: %w", err)
	}
	if l.flying, err = unix.Mmap(l.objs.Flying.FD(), 0, maxFlying*int(unsafe.Sizeof(flight{})), rw, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("writes in flight: %w", err)
	}
	consumer, err := unix.Mmap(l.objs.Ring.FD(), 0, pageSize, rw, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("ring: %w", err)
	}
	l.rings = append(l.rings, consumer)
	// The kernel offers the data twice in a row. It is mapped once, or the process
	// would seem to use twice the memory; ring puts together what goes round the end.
	producer, err := unix.Mmap(l.objs.Ring.FD(), pageSize, pageSize+int(ringBytes), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("ring: %w", err)
	}
	l.rings = append(l.rings, producer)
	l.ring = ring{consumer: word64(consumer), producer: word64(producer), data: producer[pageSize:], size: uint64(ringBytes)}
	return nil
}

// attach lets the programs run. Completions come first, so that no noted write
// completes unseen; between is called when only those run.
func (l *loaded) attach(between func() error) error {
	for _, p := range []*ebpf.Program{l.objs.OnBioComplete, l.objs.OnRequestComplete, l.objs.OnQueue} {
		if p == l.objs.OnQueue {
			if err := between(); err != nil {
				return err
			}
		}
		tp, err := link.AttachTracing(link.TracingOptions{Program: p})
		if err != nil {
			return explain("attach", err)
		}
		l.links = append(l.links, tp)
	}
	return nil
}

// close lets go of everything; what is not pinned leaves the kernel.
func (l *loaded) close() error {
	var errs []error
	for i := len(l.links) - 1; i >= 0; i-- {
		errs = append(errs, l.links[i].Close())
	}
	errs = append(errs, l.objs.Close())
	if l.notesMap != nil {
		errs = append(errs, l.notesMap.Close())
	}
	for _, mem := range append(l.rings, l.control, l.bitmap, l.flying, l.notesMem) {
		if mem != nil {
			errs = append(errs, unix.Munmap(mem))
		}
	}
	return errors.Join(errs...)
}

func disksOf(devs []*device) (disks []capture.Disk) {
	for _, d := range devs {
		disks = append(disks, d.disk)
	}
	return disks
}
