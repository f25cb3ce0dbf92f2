package nbd

import (
	"encoding/binary"
	"time"
)

// Numbers of the protocol, from the NBD project's doc/proto.md.
const (
	magicInit       = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply   = 0x0003e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
)

// Handshake flags; the client's answer uses the same bits.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Options a client sends during negotiation.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMeta        = 9
	optSetMeta         = 10
)

// Replies to options. Errors have the top bit set.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repErr         = 1 << 31
	repErrUnsup    = repErr | 1
	repErrPolicy   = repErr | 2
	repErrInvalid  = repErr | 3
	repErrTLSReqd  = repErr | 5
	repErrUnknown  = repErr | 6
	repErrShutdown = repErr | 7
	repErrTooBig   = repErr | 9
)

// Kinds of information in a repInfo.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Transmission flags: what an export can do.
const (
	txHasFlags        = 1 << 0
	txReadOnly        = 1 << 1
	txSendFlush       = 1 << 2
	txSendFUA         = 1 << 3
	txSendTrim        = 1 << 5
	txSendWriteZeroes = 1 << 6
	txSendDF          = 1 << 7
	txMultiConn       = 1 << 8
	txSendCache       = 1 << 10
	txSendFastZero    = 1 << 11
)

// Commands.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// Command flags.
const (
	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4
)

// Chunks of a structured reply. Errors have bit 15 set.
const (
	chunkFlagDone = 1 << 0

	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 | 1
	chunkErrorOffset = 1<<15 | 2
)

// States of base:allocation.
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

const contextAllocation = "base:allocation"

const (
	// MaxRequest is the longest read or write of one request, in bytes. The
	// protocol promises clients that 32 MiB work everywhere.
	MaxRequest = 32 << 20
	// MaxName is the longest export name, in bytes.
	MaxName = 4096

	requestSize    = 28
	simpleSize     = 16
	chunkSize      = 20
	maxString      = 4096
	dataHeaderSize = chunkSize + 8 // chunk header and the offset of the data
)

// request is one command of the transmission phase.
//
//	magic u32 | flags u16 | command u16 | handle u64 | offset u64 | length u32
type request struct {
	flags  uint16
	cmd    uint16
	handle uint64
	offset uint64
	length uint32
	// buf holds the payload of a write, or has room for the reply of a read.
	buf *buffer
	// err is the answer when the request was refused before it ran.
	err error
}

func (r *request) end() uint64 { return r.offset + uint64(r.length) }

func parseRequest(b []byte) (r request, ok bool) {
	be := binary.BigEndian
	r.flags = be.Uint16(b[4:])
	r.cmd = be.Uint16(b[6:])
	r.handle = be.Uint64(b[8:])
	r.offset = be.Uint64(b[16:])
	r.length = be.Uint32(b[24:])
	return r, be.Uint32(b) == magicRequest
}

func (r *request) put(b []byte) {
	be := binary.BigEndian
	be.PutUint32(b, magicRequest)
	be.PutUint16(b[4:], r.flags)
	be.PutUint16(b[6:], r.cmd)
	be.PutUint64(b[8:], r.handle)
	be.PutUint64(b[16:], r.offset)
	be.PutUint32(b[24:], r.length)
}

// putSimple writes a simple reply:
//
//	magic u32 | error u32 | handle u64
func putSimple(b []byte, e Errno, handle uint64) {
	be := binary.BigEndian
	be.PutUint32(b, magicSimple)
	be.PutUint32(b[4:], uint32(e))
	be.PutUint64(b[8:], handle)
}

// putChunk writes the head of a structured reply's chunk:
//
//	magic u32 | flags u16 | type u16 | handle u64 | length u32
func putChunk(b []byte, flags, typ uint16, handle uint64, length uint32) {
	be := binary.BigEndian
	be.PutUint32(b, magicStructured)
	be.PutUint16(b[4:], flags)
	be.PutUint16(b[6:], typ)
	be.PutUint64(b[8:], handle)
	be.PutUint32(b[16:], length)
}

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)
