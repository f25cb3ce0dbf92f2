// Package link carries the frames of one machine over one connection and
// resumes after any break. docs/format/link.md describes messages and states.
//
// Send runs the sending side with a Source, Receive the receiving side with a
// Sink. Both work on any net.Conn; who may send what is decided by the
// receiver's Open function, which asks the connection's certificate. The
// protocol itself is two state machines without I/O, sender and receiver.
//
// The package neither dials nor retries, and holds no frame longer than it
// takes to write it: keeping what is not stored is the Source's work. Send and
// Receive own the goroutines that they start and wait for them.
package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"farside/internal/dr"
	"farside/internal/frame"
)

const (
	version    = 1
	headerSize = 8
	maxText    = 1024

	magic = "FSLK"
)

var le = binary.LittleEndian

type msgType uint8

const (
	msgHello msgType = iota + 1
	msgWelcome
	msgRefuse
	msgFrame
	msgAck
	msgPing
	msgCall
	msgAnswer
)

const (
	helloSize   = 32
	bootSize    = 24 // of a hello's boot, which may be missing
	welcomeSize = 80
	ackSize     = 16
	refuseFixed = 8
)

// bodyLimits returns the least and the most bytes of a body; ok is false for
// an unknown type.
func (t msgType) bodyLimits() (low, high int, ok bool) {
	switch t {
	case msgHello:
		return helloSize, helloSize + bootSize, true
	case msgWelcome:
		return welcomeSize, welcomeSize, true
	case msgRefuse:
		return refuseFixed, refuseFixed + maxText, true
	case msgFrame:
		return frame.HeaderSize, frame.MaxSize, true
	case msgAck:
		return ackSize, ackSize, true
	case msgPing:
		return 0, 0, true
	case msgCall:
		return callFixed, callFixed + MaxCall, true
	case msgAnswer:
		return answerFixed, answerFixed + MaxCall, true
	}
	return 0, 0, false
}

// Hello is how a sender introduces a stream.
type Hello struct {
	Machine  dr.MachineID
	Timeline dr.Timeline
	Boot     Boot // of the machine that sends; zero: not known, or sent on by another
}

// Boot tells one run of an operating system from every other: a machine from its clone, and from
// itself before it was restarted.
type Boot struct {
	ID [16]byte      // random, as the system chose it when it booted
	Up time.Duration // since then, in milliseconds; never negative
}

// Ack is how far a receiver has come.
type Ack struct{ Stored, Durable dr.Seq }

// Code is the reason of a refusal, of a stream or of a call.
type Code uint16

// The codes of a refusal. Those behind CodeCorrupt answer calls.
const (
	CodeVersion Code = iota + 1
	CodeDenied
	CodeUnknown
	CodeTimeline
	CodeGap
	CodeNotReady
	CodeCorrupt
	CodeInvalid
	CodeUnsupported
	CodeFull
)

// kinds gives the error kind of each code.
var kinds = map[Code]error{
	CodeVersion: dr.ErrVersion, CodeDenied: dr.ErrDenied, CodeUnknown: dr.ErrNotFound, CodeTimeline: dr.ErrTimeline,
	CodeGap: dr.ErrGap, CodeNotReady: dr.ErrUnavailable, CodeCorrupt: dr.ErrCorrupt,
	CodeInvalid: dr.ErrInvalid, CodeUnsupported: dr.ErrUnsupported, CodeFull: dr.ErrFull,
}

// Refused is the error of a stream that the receiver refused, or of a call that the
// other side did. It unwraps to the dr kind of its code.
type Refused struct {
	Code       Code
	RetryAfter time.Duration
	Text       string
}

// Error implements error.
func (r *Refused) Error() string { return "refused by the other side: " + r.Text }

// Unwrap returns the kind of error.
func (r *Refused) Unwrap() error { return kinds[r.Code] }

// The codes by which an error is told, in the order in which they are tried.
var (
	ofStreams = []Code{CodeVersion, CodeDenied, CodeUnknown, CodeTimeline, CodeGap, CodeCorrupt}
	ofCalls   = append(ofStreams[:len(ofStreams):len(ofStreams)], CodeInvalid, CodeUnsupported, CodeFull)
)

// refusal turns an error of the receiving side into what is told the sender of a
// stream.
func refusal(err error) *Refused { return refuse(err, ofStreams) }

func refuse(err error, codes []Code) *Refused {
	if r := (*Refused)(nil); errors.As(err, &r) {
		return r
	}
	text := err.Error()
	if len(text) > maxText {
		text = strings.ToValidUTF8(text[:maxText], "")
	}
	for _, code := range codes {
		if errors.Is(err, kinds[code]) {
			return &Refused{Code: code, Text: text}
		}
	}
	return &Refused{Code: CodeNotReady, RetryAfter: time.Second, Text: text}
}

func putHeader(b []byte, t msgType, n int) {
	clear(b[:headerSize])
	b[0] = byte(t)
	le.PutUint32(b[4:], uint32(n))
}

// parseHeader returns the type and the length of the body; errors wrap
// dr.ErrCorrupt.
func parseHeader(b []byte) (msgType, int, error) {
	t, n := msgType(b[0]), le.Uint32(b[4:])
	low, high, ok := t.bodyLimits()
	if !ok || b[1]|b[2]|b[3] != 0 || int64(n) < int64(low) || int64(n) > int64(high) {
		return 0, 0, fmt.Errorf("link message of type %d with %d bytes: not this protocol: %w", b[0], n, dr.ErrCorrupt)
	}
	return t, int(n), nil
}

func message(t msgType, body []byte) []byte {
	b := make([]byte, headerSize, headerSize+len(body))
	putHeader(b, t, len(body))
	return append(b, body...)
}

func (h Hello) encode() []byte {
	b := make([]byte, helloSize, helloSize+bootSize)
	copy(b, magic)
	le.PutUint16(b[4:], version)
	copy(b[8:], h.Machine[:])
	le.PutUint32(b[24:], uint32(h.Timeline))
	if h.Boot.ID != ([16]byte{}) {
		b = append(b, h.Boot.ID[:]...)
		b = le.AppendUint64(b, uint64(max(h.Boot.Up, 0).Milliseconds()))
	}
	return message(msgHello, b)
}

// maxUp bounds what a hello may say of a boot: more than any system runs, and nothing that overflows.
const maxUp = 100 * 365 * 24 * time.Hour

func parseHello(b []byte) (Hello, error) {
	if len(b) != helloSize && len(b) != helloSize+bootSize || string(b[:4]) != magic {
		return Hello{}, fmt.Errorf("hello: not this protocol: %w", dr.ErrCorrupt)
	}
	if v := le.Uint16(b[4:]); v != version {
		return Hello{}, fmt.Errorf("link version %d, this program knows %d: %w", v, version, dr.ErrVersion)
	}
	h := Hello{Machine: dr.MachineID(b[8:24]), Timeline: dr.Timeline(le.Uint32(b[24:]))}
	if len(b) > helloSize {
		ms := le.Uint64(b[helloSize+16:])
		if ms > uint64(maxUp.Milliseconds()) {
			return Hello{}, fmt.Errorf("hello of a system that runs for %d ms: %w", ms, dr.ErrCorrupt)
		}
		h.Boot = Boot{ID: [16]byte(b[helloSize:]), Up: time.Duration(ms) * time.Millisecond}
	}
	return h, nil
}

func encodeWelcome(c frame.Cursor, durable dr.Seq) []byte {
	b := make([]byte, welcomeSize)
	copy(b, c.Machine[:])
	le.PutUint32(b[16:], uint32(c.Position.Timeline))
	le.PutUint64(b[24:], uint64(c.Position.Seq))
	le.PutUint64(b[32:], uint64(c.Time))
	copy(b[40:], c.Chain[:])
	le.PutUint64(b[72:], uint64(durable))
	return message(msgWelcome, b)
}

func parseWelcome(b []byte) (c frame.Cursor, durable dr.Seq, err error) {
	if len(b) != welcomeSize {
		return c, 0, fmt.Errorf("welcome of %d bytes: %w", len(b), dr.ErrCorrupt)
	}
	c = frame.Cursor{
		Machine:  dr.MachineID(b[:16]),
		Position: dr.Position{Timeline: dr.Timeline(le.Uint32(b[16:])), Seq: dr.Seq(le.Uint64(b[24:]))},
		Time:     int64(le.Uint64(b[32:])), Chain: [32]byte(b[40:]),
	}
	return c, dr.Seq(le.Uint64(b[72:])), nil
}

func (a Ack) encode() []byte {
	b := make([]byte, ackSize)
	le.PutUint64(b, uint64(a.Stored))
	le.PutUint64(b[8:], uint64(a.Durable))
	return message(msgAck, b)
}

func parseAck(b []byte) (Ack, error) {
	if len(b) != ackSize {
		return Ack{}, fmt.Errorf("ack of %d bytes: %w", len(b), dr.ErrCorrupt)
	}
	return Ack{dr.Seq(le.Uint64(b)), dr.Seq(le.Uint64(b[8:]))}, nil
}

func (r *Refused) encode() []byte {
	text := r.Text[:min(len(r.Text), maxText)]
	b := make([]byte, refuseFixed, refuseFixed+len(text))
	le.PutUint16(b, uint16(r.Code))
	le.PutUint32(b[4:], uint32(min(r.RetryAfter.Milliseconds(), 1<<31)))
	return message(msgRefuse, append(b, text...))
}

func parseRefuse(b []byte) (*Refused, error) {
	if len(b) < refuseFixed {
		return nil, fmt.Errorf("refusal of %d bytes: %w", len(b), dr.ErrCorrupt)
	}
	r := &Refused{
		Code: Code(le.Uint16(b)), RetryAfter: time.Duration(le.Uint32(b[4:])) * time.Millisecond,
		Text: strings.ToValidUTF8(string(b[refuseFixed:]), "?"),
	}
	if kinds[r.Code] == nil {
		return nil, fmt.Errorf("refusal with unknown code %d: %s: %w", r.Code, r.Text, dr.ErrCorrupt)
	}
	return r, nil
}

// readMessage reads one message; the body is a fresh slice. A large body is
// allocated only as it arrives, so that a length alone costs no memory.
func readMessage(r io.Reader) (msgType, []byte, error) {
	var head [headerSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	t, n, err := parseHeader(head[:])
	if err != nil {
		return 0, nil, err
	}
	if t != msgFrame {
		body := make([]byte, n)
		_, err := io.ReadFull(r, body)
		return t, body, err
	}
	// The frame's own header is checked before its length is believed.
	var fixed [frame.HeaderSize]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return 0, nil, err
	}
	h, err := frame.ParseHeader(fixed[:])
	if err == nil && h.Size() != int64(n) {
		err = fmt.Errorf("message of %d bytes holds a frame of %d: %w", n, h.Size(), dr.ErrCorrupt)
	}
	if err != nil {
		return 0, nil, err
	}
	body := make([]byte, n)
	copy(body, fixed[:])
	_, err = io.ReadFull(r, body[frame.HeaderSize:])
	return t, body, err
}
