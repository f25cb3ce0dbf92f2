// Package dr holds the values that every part of Farside speaks of: identities,
// positions, extents, recovery points, tags and the kinds of errors.
//
// It does no I/O, starts no goroutine, reads no clock (random ids take their
// randomness from crypto/rand) and holds no behaviour that only "both need".
// All types are plain values, safe to copy and to share between goroutines.
package dr

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// SectorSize is the unit, in bytes, of every offset and length on a disk.
const SectorSize = 512

// MachineID names a protected machine. It is Farside's own and never derived
// from a host name or firmware UUID, which clones share.
type MachineID [16]byte

// NodeID names a node: one installed role.
type NodeID [16]byte

// NewMachineID returns a random id (version 4 UUID).
func NewMachineID() MachineID { return MachineID(newUUID()) }

// NewNodeID returns a random id (version 4 UUID).
func NewNodeID() NodeID { return NodeID(newUUID()) }

// IsZero reports whether the id is unset.
func (id MachineID) IsZero() bool { return id == MachineID{} }

// IsZero reports whether the id is unset.
func (id NodeID) IsZero() bool { return id == NodeID{} }

// String returns the id in UUID form.
func (id MachineID) String() string { return formatUUID(id) }

// String returns the id in UUID form.
func (id NodeID) String() string { return formatUUID(id) }

// ParseMachineID reads the form that String writes.
func ParseMachineID(s string) (MachineID, error) {
	u, err := parseUUID(s)
	return MachineID(u), err
}

// ParseNodeID reads the form that String writes.
func ParseNodeID(s string) (NodeID, error) {
	u, err := parseUUID(s)
	return NodeID(u), err
}

// MarshalText implements encoding.TextMarshaler.
func (id MachineID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *MachineID) UnmarshalText(b []byte) (err error) {
	*id, err = ParseMachineID(string(b))
	return err
}

// MarshalText implements encoding.TextMarshaler.
func (id NodeID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *NodeID) UnmarshalText(b []byte) (err error) {
	*id, err = ParseNodeID(string(b))
	return err
}

func newUUID() (u [16]byte) {
	rand.Read(u[:]) // never fails: crypto/rand aborts the program instead
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

func formatUUID(u [16]byte) string {
	h := hex.EncodeToString(u[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

func parseUUID(s string) (u [16]byte, err error) {
	h := strings.ReplaceAll(s, "-", "")
	if len(h) != 32 || len(s) != 36 && len(s) != 32 {
		return u, fmt.Errorf("parse id %q: %w", s, ErrInvalid)
	}
	if _, err := hex.Decode(u[:], []byte(h)); err != nil {
		return u, fmt.Errorf("parse id %q: %w", s, ErrInvalid)
	}
	return u, nil
}

// DiskID numbers a disk within its machine. The configuration server assigns
// it when the disk is protected and never reuses it.
type DiskID uint16

// Disk describes a protected disk of a machine.
type Disk struct {
	ID   DiskID `json:"id"`
	Size int64  `json:"size"` // bytes, a multiple of SectorSize
	Name string `json:"name"` // for people, e.g. "/dev/sda"; never an identity
}

// Timeline numbers a branch of a machine's history. It rises at every
// failover, so that a machine that returns from the past can be refused.
type Timeline uint32

// Seq numbers the changes of a machine within a timeline, from 1, across all
// its disks. Zero is the state before the first change.
type Seq uint64

// Position names one state of all disks of a machine: the one right after
// change Seq of Timeline.
type Position struct {
	Timeline Timeline `json:"timeline"`
	Seq      Seq      `json:"seq"`
}

// String returns "timeline:seq", e.g. "1:4711".
func (p Position) String() string {
	return strconv.FormatUint(uint64(p.Timeline), 10) + ":" + strconv.FormatUint(uint64(p.Seq), 10)
}

// ParsePosition reads the form that String writes.
func ParsePosition(s string) (Position, error) {
	tl, seq, ok := strings.Cut(s, ":")
	t, err1 := strconv.ParseUint(tl, 10, 32)
	q, err2 := strconv.ParseUint(seq, 10, 64)
	if !ok || err1 != nil || err2 != nil {
		return Position{}, fmt.Errorf("parse position %q: want TIMELINE:SEQ: %w", s, ErrInvalid)
	}
	return Position{Timeline(t), Seq(q)}, nil
}

// Extent is a range of bytes of one disk. Offset and Length are multiples of
// SectorSize.
type Extent struct {
	Disk   DiskID
	Offset int64
	Length int64
}

// End returns the first offset behind the extent.
func (e Extent) End() int64 { return e.Offset + e.Length }

// String returns "disk:[offset,end)".
func (e Extent) String() string {
	return fmt.Sprintf("%d:[%d,%d)", e.Disk, e.Offset, e.End())
}

// What says what a change does to its extent.
type What uint8

// The kinds of change. A discarded extent reads as zeroes in Farside: a
// filesystem does not read what it discarded, so zero is as right as any.
const (
	Data What = iota + 1
	Zero
	Discard
)

// String returns the name of w.
func (w What) String() string {
	switch w {
	case Data:
		return "data"
	case Zero:
		return "zero"
	case Discard:
		return "discard"
	}
	return fmt.Sprintf("what(%d)", uint8(w))
}

// Accuracy says which moments of a span can be recovered.
type Accuracy uint8

// Accuracies, finest first.
const (
	Exact Accuracy = iota + 1 // the order of writes is known: each is a point
	Epoch                     // a set of changes between two moments: only its end is a point
)

// String returns the name of a.
func (a Accuracy) String() string {
	switch a {
	case Exact:
		return "exact"
	case Epoch:
		return "epoch"
	}
	return fmt.Sprintf("accuracy(%d)", uint8(a))
}

// Consistency says what was done to make a recovery point clean.
type Consistency uint8

// Consistencies, weakest first.
const (
	Crash       Consistency = iota + 1 // as after a power cut
	FileSystem                         // all file systems were frozen
	Application                        // application hooks ran

	Revoked Consistency = 255 // of a tag that only withdraws the tag of its id
)

// String returns the name of c.
func (c Consistency) String() string {
	switch c {
	case Crash:
		return "crash"
	case FileSystem:
		return "filesystem"
	case Application:
		return "application"
	case Revoked:
		return "revoked"
	}
	return fmt.Sprintf("consistency(%d)", uint8(c))
}

// Tag is a named, kept marker in the stream of a machine.
type Tag struct {
	ID          [16]byte // chosen by who asks for it; asking twice tags once
	Consistency Consistency
	Name        string   // UTF-8, at most MaxTagName bytes
	Group       [16]byte // the group tag that it is part of, or zero
}

// MaxTagName is the longest name of a tag, in bytes.
const MaxTagName = 255

// RecoveryPoint is a moment to which a machine can be brought back.
type RecoveryPoint struct {
	Position    Position
	Time        int64 // UTC nanoseconds
	Accuracy    Accuracy
	Consistency Consistency
	Tag         string // its name, or ""
}
