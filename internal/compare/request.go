package compare

import (
	"encoding/binary"
	"fmt"

	"farside/internal/dr"
)

// What a request may be like.
const (
	MinShift = 12       // blocks of 4 KiB
	MaxShift = 20       // blocks of 1 MiB
	MaxBytes = 1 << 30  // of disk that one request is about: bounds the work
	MaxSums  = 32 << 10 // blocks of one request: bounds its size
)

const (
	version        = 1
	requestHeader  = 80
	answerHeader   = 24
	kindBits       = 2
	kindsPerByte   = 8 / kindBits
	requestMagic   = "FSCQ"
	answerMagic    = "FSCA"
	sectorMultiple = dr.SectorSize
)

var le = binary.LittleEndian

// Kind says what a request tells about a block.
type Kind uint8

// The kinds.
const (
	Skip Kind = iota // nothing: it is not asked for
	Zero             // it is all zero
	Data             // its Sum
)

// Request asks whether blocks of a disk are what the asking side has. The
// machine is that of the link.
type Request struct {
	Disk dr.DiskID
	// Shift is the block size as a power of two, MinShift to MaxShift.
	Shift uint8
	// Floor is what the answering side must have reached: it answers for that
	// position or a later one, or with dr.ErrUnavailable.
	Floor dr.Position
	// First is the number of the first block, Length the bytes from there on that
	// are asked for: a multiple of the sector size; the last block may be short.
	First, Length int64
	Key           Key

	Kinds []Kind // of each block
	Sums  []Sum  // of the blocks of kind Data, in their order
}

// Offset returns where the request begins on the disk, in bytes.
func (r *Request) Offset() int64 { return r.First << r.Shift }

// Blocks returns how many blocks the request is about.
func (r *Request) Blocks() int { return int((r.Length + 1<<r.Shift - 1) >> r.Shift) }

// Block returns the range on the disk of the i-th block of the request.
func (r *Request) Block(i int) dr.Extent {
	off := (r.First + int64(i)) << r.Shift
	return dr.Extent{Disk: r.Disk, Offset: off, Length: min(1<<r.Shift, r.Offset()+r.Length-off)}
}

// Add tells about the next block; sum is for Data only.
func (r *Request) Add(k Kind, sum Sum) {
	r.Kinds = append(r.Kinds, k)
	if k == Data {
		r.Sums = append(r.Sums, sum)
	}
}

// check refuses what docs/format/compare.md does not allow.
func (r *Request) check() error {
	switch {
	case r.Shift < MinShift || r.Shift > MaxShift:
		return fmt.Errorf("blocks of 1<<%d bytes: %w", r.Shift, dr.ErrInvalid)
	case r.Length <= 0 || r.Length > MaxBytes || r.Length%sectorMultiple != 0 || r.Blocks() > MaxSums:
		return fmt.Errorf("%d bytes: %w", r.Length, dr.ErrInvalid)
	case r.First < 0 || r.First > (1<<62)>>r.Shift:
		return fmt.Errorf("block %d: %w", r.First, dr.ErrInvalid)
	}
	return nil
}

// Encode returns the bytes of r. Errors wrap dr.ErrInvalid.
func (r *Request) Encode() ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("encode compare request: %w", err)
	}
	if len(r.Kinds) != r.Blocks() {
		return nil, fmt.Errorf("encode compare request: %d of %d blocks: %w", len(r.Kinds), r.Blocks(), dr.ErrInvalid)
	}
	b := make([]byte, requestHeader, requestHeader+len(r.Kinds)/kindsPerByte+1+SumSize*len(r.Sums))
	copy(b, requestMagic)
	le.PutUint16(b[4:], version)
	le.PutUint16(b[6:], uint16(r.Disk))
	b[8] = r.Shift
	le.PutUint32(b[12:], uint32(r.Floor.Timeline))
	le.PutUint64(b[16:], uint64(r.Floor.Seq))
	le.PutUint64(b[24:], uint64(r.First))
	le.PutUint64(b[32:], uint64(r.Length))
	le.PutUint32(b[40:], uint32(len(r.Sums)))
	copy(b[48:], r.Key[:])
	kinds := make([]byte, (len(r.Kinds)+kindsPerByte-1)/kindsPerByte)
	for i, k := range r.Kinds {
		kinds[i/kindsPerByte] |= byte(k) << (i % kindsPerByte * kindBits)
	}
	b = append(b, kinds...)
	for i := range r.Sums {
		b = append(b, r.Sums[i][:]...)
	}
	return b, nil
}

// ParseRequest reads a request. Errors wrap dr.ErrCorrupt, dr.ErrVersion or
// dr.ErrInvalid.
func ParseRequest(b []byte) (*Request, error) {
	r, err := parseRequest(b)
	if err != nil {
		return nil, fmt.Errorf("read compare request of %d bytes: %w", len(b), err)
	}
	return r, nil
}

func parseRequest(b []byte) (*Request, error) {
	if err := checkHead(b, requestMagic, requestHeader); err != nil {
		return nil, err
	}
	r := &Request{
		Disk: dr.DiskID(le.Uint16(b[6:])), Shift: b[8],
		Floor: dr.Position{Timeline: dr.Timeline(le.Uint32(b[12:])), Seq: dr.Seq(le.Uint64(b[16:]))},
		First: int64(le.Uint64(b[24:])), Length: int64(le.Uint64(b[32:])), Key: Key(b[48:80]),
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	n, sums := r.Blocks(), int(le.Uint32(b[40:]))
	kinds := (n + kindsPerByte - 1) / kindsPerByte
	if b[9]|b[10]|b[11] != 0 || le.Uint32(b[44:]) != 0 || sums > n || len(b) != requestHeader+kinds+SumSize*sums {
		return nil, dr.ErrCorrupt
	}
	if err := r.parseKinds(b[requestHeader:][:kinds], n, sums); err != nil {
		return nil, err
	}
	r.Sums = make([]Sum, sums)
	for i := range r.Sums {
		copy(r.Sums[i][:], b[requestHeader+kinds+SumSize*i:])
	}
	return r, nil
}

func (r *Request) parseKinds(b []byte, n, sums int) error {
	r.Kinds = make([]Kind, n)
	data := 0
	for i := range len(b) * kindsPerByte {
		k := Kind(b[i/kindsPerByte] >> (i % kindsPerByte * kindBits) & (1<<kindBits - 1))
		if k > Data || i >= n && k != 0 {
			return fmt.Errorf("kind %d of block %d: %w", k, i, dr.ErrCorrupt)
		}
		if k == Data {
			data++
		}
		if i < n {
			r.Kinds[i] = k
		}
	}
	if data != sums {
		return fmt.Errorf("%d hashes for %d blocks: %w", sums, data, dr.ErrCorrupt)
	}
	return nil
}

func checkHead(b []byte, magic string, size int) error {
	if len(b) < size || string(b[:4]) != magic {
		return dr.ErrCorrupt
	}
	if v := le.Uint16(b[4:]); v != version {
		return fmt.Errorf("version %d: %w", v, dr.ErrVersion)
	}
	return nil
}
