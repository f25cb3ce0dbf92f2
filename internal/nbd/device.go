package nbd

import (
	"errors"
	"fmt"
	"io"
)

// Device is what the server needs of a disk. Offsets and lengths are in
// bytes, within [0, Size()) and multiples of the export's minimum block size.
// All methods are called concurrently.
type Device interface {
	io.ReaderAt
	io.WriterAt
	// Size is constant while the device is exported.
	Size() int64
	// Flush returns when every write that returned before the call is durable.
	Flush() error
}

// Zeroer is a device that can zero a range without being sent the zeroes; the
// range may become a hole. An error that is errors.ErrUnsupported makes the
// server write zeroes instead.
type Zeroer interface {
	Zero(off, n int64) error
}

// NoHoleZeroer is a device that can zero a range and keep it allocated. The
// server writes zeroes where a client asks for that and the device can't.
type NoHoleZeroer interface {
	ZeroNoHole(off, n int64) error
}

// Trimmer is a device that can forget a range. What it reads afterwards is
// the device's choice.
type Trimmer interface {
	Trim(off, n int64) error
}

// Mapper is a device that knows which parts of it hold nothing. It calls fn
// for consecutive, non-empty, gapless extents that start at off, until
// [off, off+n) is covered or fn returns an error, which Map returns. The last
// one may end behind off+n. zero says that the extent reads as zeroes, hole
// that it occupies no space.
type Mapper interface {
	Map(off, n int64, fn func(off, n int64, zero, hole bool) error) error
}

// Prefetcher is a device that can read ahead for a client that announces what
// it will read. An error is the client's to see; it may ignore it.
type Prefetcher interface {
	Prefetch(off, n int64) error
}

// MultiConner is a device that says whether a Flush through one connection
// also covers what was written through the others. Clients open several
// connections to it only then.
type MultiConner interface {
	MultiConn() bool
}

// ReadOnlyer is a device that may refuse all changes.
type ReadOnlyer interface {
	ReadOnly() bool
}

// Export is a device under a name.
type Export struct {
	Device Device
	// ReadOnly refuses changes, whatever the device says.
	ReadOnly bool
	// Description is for people; it may be empty.
	Description string
	// MinBlock and PreferredBlock are powers of two, in bytes. Zero means 1
	// and 4096. Requests that are not aligned to MinBlock get EINVAL.
	MinBlock, PreferredBlock uint32
	// Gone, if not nil, is closed to end all connections to the export: what
	// is in flight is answered, then they close.
	Gone <-chan struct{}
	// Release, if not nil, is called once for each successful Lookup, when
	// the server doesn't use the export any more.
	Release func()
}

func (e *Export) release() {
	if e.Release != nil {
		e.Release()
	}
}

func (e *Export) gone() bool {
	select {
	case <-e.Gone: // a nil channel never is
		return true
	default:
		return false
	}
}

func (e *Export) check() error {
	if e.Device == nil || e.Device.Size() < 0 {
		return errors.New("export without a device of known size")
	}
	for _, b := range []uint32{e.MinBlock, e.PreferredBlock} {
		if b&(b-1) != 0 || b > MaxRequest {
			return fmt.Errorf("export with block size %d", b)
		}
	}
	return nil
}

func (e *Export) minBlock() uint32 { return max(e.MinBlock, 1) }

func (e *Export) readOnly() bool {
	if e.ReadOnly {
		return true
	}
	r, ok := e.Device.(ReadOnlyer)
	return ok && r.ReadOnly()
}

// flags are the transmission flags without those that depend on what the
// client negotiated.
func (e *Export) flags() uint16 {
	f := uint16(txHasFlags | txSendFlush | txSendFUA | txSendCache)
	if m, ok := e.Device.(MultiConner); ok && m.MultiConn() {
		f |= txMultiConn
	}
	if e.readOnly() {
		return f | txReadOnly
	}
	f |= txSendWriteZeroes
	if _, ok := e.Device.(Trimmer); ok {
		f |= txSendTrim
	}
	if _, ok := e.Device.(Zeroer); ok {
		f |= txSendFastZero
	}
	return f
}

// blockSizes are minimum, preferred and maximum, as advertised.
func (e *Export) blockSizes() (lo, preferred, hi uint32) {
	lo, preferred = e.minBlock(), e.PreferredBlock
	if preferred == 0 {
		preferred = 4096
	}
	return lo, max(preferred, lo), MaxRequest
}
