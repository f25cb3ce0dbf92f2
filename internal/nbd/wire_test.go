package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// raw is a client that can also do wrong.
type raw struct {
	t *testing.T
	net.Conn
}

var be = binary.BigEndian

func dialRaw(t *testing.T, s *testServer) *raw {
	t.Helper()
	c, err := net.Dial("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return &raw{t, c}
}

func (r *raw) send(parts ...any) {
	r.t.Helper()
	var b bytes.Buffer
	for _, p := range parts {
		if s, ok := p.(string); ok {
			p = []byte(s)
		}
		if err := binary.Write(&b, be, p); err != nil {
			r.t.Fatal(err)
		}
	}
	if _, err := r.Write(b.Bytes()); err != nil {
		r.t.Fatal(err)
	}
}

func (r *raw) recv(n int) []byte {
	r.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		r.t.Fatalf("want %d bytes: %v", n, err)
	}
	return b
}

// greet does the first exchange.
func (r *raw) greet(flags uint32) {
	r.t.Helper()
	if b := r.recv(18); string(b[:16]) != "NBDMAGICIHAVEOPT" || be.Uint16(b[16:]) != 3 {
		r.t.Fatalf("greeting %q", b)
	}
	r.send(flags)
}

func (r *raw) option(opt uint32, data ...any) {
	r.t.Helper()
	var b bytes.Buffer
	for _, p := range data {
		if s, ok := p.(string); ok {
			p = []byte(s)
		}
		binary.Write(&b, be, p)
	}
	r.send(uint64(magicOption), opt, uint32(b.Len()), b.Bytes())
}

func (r *raw) reply(opt uint32) (typ uint32, data []byte) {
	r.t.Helper()
	b := r.recv(20)
	if be.Uint64(b) != magicOptReply || be.Uint32(b[8:]) != opt {
		r.t.Fatalf("reply %x to option %d", b, opt)
	}
	return be.Uint32(b[12:]), r.recv(int(be.Uint32(b[16:])))
}

// expect sends an option and wants exactly these types of replies.
func (r *raw) expect(types []uint32, opt uint32, data ...any) [][]byte {
	r.t.Helper()
	r.option(opt, data...)
	var all [][]byte
	for i, want := range types {
		typ, data := r.reply(opt)
		if typ != want {
			r.t.Fatalf("option %d: reply %d is %#x %q, want %#x", opt, i, typ, data, want)
		}
		all = append(all, data)
	}
	return all
}

// closed wants the server to hang up.
func (r *raw) closed() {
	r.t.Helper()
	if n, err := r.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		r.t.Fatalf("connection goes on: %d, %v", n, err)
	}
}

func (r *raw) goTo(structured bool) {
	r.t.Helper()
	r.greet(3)
	if structured {
		r.expect([]uint32{repAck}, optStructuredReply)
		r.expect([]uint32{repMetaContext, repAck}, optSetMeta, uint32(0), uint32(1), uint32(15), contextAllocation)
	}
	r.expect([]uint32{repInfo, repInfo, repAck}, optGo, uint32(0), uint16(0))
}

func (r *raw) request(flags, cmd uint16, handle, off uint64, n uint32, payload ...byte) {
	r.t.Helper()
	r.send(uint32(magicRequest), flags, cmd, handle, off, n, payload)
}

// simple wants a simple reply.
func (r *raw) simple(handle uint64, want Errno) {
	r.t.Helper()
	b := r.recv(simpleSize)
	if be.Uint32(b) != magicSimple || be.Uint64(b[8:]) != handle || Errno(be.Uint32(b[4:])) != want {
		r.t.Fatalf("reply %x, want handle %d with %v", b, handle, want)
	}
}

// chunk wants a structured chunk and returns its body.
func (r *raw) chunk(handle uint64, flags, typ uint16) []byte {
	r.t.Helper()
	b := r.recv(chunkSize)
	body := r.recv(int(be.Uint32(b[16:])))
	if be.Uint32(b) != magicStructured || be.Uint16(b[4:]) != flags || be.Uint16(b[6:]) != typ || be.Uint64(b[8:]) != handle {
		r.t.Fatalf("chunk %x %q, want handle %d, flags %d, type %d", b, body, handle, flags, typ)
	}
	return body
}

// errChunk wants an error chunk.
func (r *raw) errChunk(handle uint64, want Errno) {
	r.t.Helper()
	b := r.chunk(handle, chunkFlagDone, chunkError)
	if Errno(be.Uint32(b)) != want || int(be.Uint16(b[4:])) != len(b)-6 {
		r.t.Fatalf("error chunk %x, want %v", b, want)
	}
}

func TestNegotiation(t *testing.T) {
	gone := make(chan struct{})
	close(gone)
	exports := map[string]*Export{
		"":       {Device: newTestDevice(1 << 20), Description: "all of it", MinBlock: 512, PreferredBlock: 1 << 16},
		"gone":   {Device: newTestDevice(512), Gone: gone},
		"broken": {},
		"odd":    {Device: newTestDevice(512), MinBlock: 3},
	}
	lookup := func(name string) (*Export, error) {
		switch e := exports[name]; {
		case e != nil:
			return e, nil
		case name == "secret":
			return nil, EPERM
		case name == "late":
			return nil, ESHUTDOWN
		}
		return nil, ErrUnknownExport
	}
	s := serve(t, Config{Lookup: lookup, List: func() []string { return []string{"a", strings.Repeat("x", MaxName+1), "b"} }}, nil)
	r := dialRaw(t, s)
	r.greet(3)
	named := func(name string) []any { return []any{uint32(len(name)), name, uint16(0)} }
	for name, want := range map[string]uint32{
		"x": repErrUnknown, "gone": repErrUnknown, "broken": repErrUnknown, "odd": repErrUnknown,
		"secret": repErrPolicy, "late": repErrShutdown, strings.Repeat("x", MaxName+1): repErrUnknown,
	} {
		r.expect([]uint32{want}, optGo, named(name)...)
		r.expect([]uint32{want}, optInfo, named(name)...)
	}
	// Malformed options are refused and forgotten.
	r.expect([]uint32{repErrInvalid}, optGo, uint32(5), "x")
	r.expect([]uint32{repErrInvalid}, optGo, uint32(0), uint16(2), uint16(3))
	r.expect([]uint32{repErrInvalid}, optGo)
	r.expect([]uint32{repErrInvalid}, optList, "x")
	r.expect([]uint32{repErrInvalid}, optStructuredReply, "x")
	r.expect([]uint32{repErrPolicy}, optStartTLS)
	r.expect([]uint32{repErrUnsup}, 6789, "data")
	r.expect([]uint32{repErrTooBig}, 6789, make([]byte, maxOption+1))
	r.expect([]uint32{repErrInvalid}, optSetMeta, uint32(0), uint32(0)) // before structured replies
	r.expect([]uint32{repAck}, optStructuredReply)
	r.expect([]uint32{repErrInvalid}, optSetMeta, uint32(0), uint32(1), uint32(99), "base:")
	r.expect([]uint32{repErrInvalid}, optSetMeta, uint32(0), uint32(0), "trailing")
	r.expect([]uint32{repErrInvalid}, optListMeta, uint32(1))
	r.expect([]uint32{repErrUnknown}, optListMeta, uint32(1), "x", uint32(0))
	// Contexts.
	for _, q := range []string{"base:", contextAllocation} {
		r.expect([]uint32{repMetaContext, repAck}, optListMeta, uint32(0), uint32(1), uint32(len(q)), q)
	}
	r.expect([]uint32{repMetaContext, repAck}, optListMeta, uint32(0), uint32(0))
	r.expect([]uint32{repAck}, optListMeta, uint32(0), uint32(1), uint32(3), "x:y")
	r.expect([]uint32{repAck}, optSetMeta, uint32(0), uint32(1), uint32(5), "base:") // SET wants leaves
	r.expect([]uint32{repAck}, optSetMeta, uint32(0), uint32(0))
	// List and information.
	if l := r.expect([]uint32{repServer, repServer, repAck}, optList); string(l[0][4:]) != "a" || string(l[1][4:]) != "b" {
		t.Errorf("list %q", l)
	}
	r.option(optInfo, uint32(0), uint16(3), uint16(infoDescription), uint16(infoBlockSize), uint16(infoName))
	got := map[uint16][]byte{}
	for {
		typ, data := r.reply(optInfo)
		if typ == repAck {
			break
		}
		got[be.Uint16(data)] = data[2:]
	}
	want := be.AppendUint32(be.AppendUint32(be.AppendUint32(nil, 512), 1<<16), MaxRequest)
	if string(got[infoDescription]) != "all of it" || !bytes.Equal(got[infoBlockSize], want) || got[infoName] != nil {
		t.Errorf("information %v", got)
	}
	r.expect([]uint32{repAck}, optAbort)
	r.closed()
	if l := s.logged(); len(l) != 0 {
		t.Errorf("logged %v", l)
	}
}

// TestGarbage: what is no NBD is hung up on, with a word in the log.
func TestGarbage(t *testing.T) {
	tests := map[string]func(r *raw){
		"http":         func(r *raw) { r.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n") },
		"flags":        func(r *raw) { r.greet(0x80) },
		"option magic": func(r *raw) { r.greet(3); r.send("0123456789abcdef") },
		"half option":  func(r *raw) { r.greet(3); r.send("IHAVE"); r.Conn.(*net.UnixConn).CloseWrite() },
		"half data": func(r *raw) {
			r.greet(3)
			r.send(uint64(magicOption), uint32(optGo), uint32(9), "x")
			r.Conn.(*net.UnixConn).CloseWrite()
		},
		"half flags":    func(r *raw) { r.send("x"); r.Conn.(*net.UnixConn).CloseWrite() },
		"huge option":   func(r *raw) { r.greet(3); r.send(uint64(magicOption), uint32(optGo), uint32(1<<31)) },
		"not fixed":     func(r *raw) { r.greet(2); r.option(optList) },
		"unknown name":  func(r *raw) { r.greet(3); r.option(optExportName, "unknown") },
		"long name":     func(r *raw) { r.greet(3); r.option(optExportName, strings.Repeat("x", MaxName+1)) },
		"request magic": func(r *raw) { r.goTo(true); r.send(make([]byte, 28)) },
		"half request":  func(r *raw) { r.goTo(true); r.send(uint32(magicRequest)); r.Conn.(*net.UnixConn).CloseWrite() },
		"half payload": func(r *raw) {
			r.goTo(true)
			r.request(0, cmdWrite, 1, 0, 512, 1, 2, 3)
			r.Conn.(*net.UnixConn).CloseWrite()
		},
		"half refused": func(r *raw) {
			r.goTo(true)
			r.request(0, cmdWrite, 1, 1<<40, 512, 1, 2, 3)
			r.Conn.(*net.UnixConn).CloseWrite()
		},
		"many options": func(r *raw) {
			r.greet(3)
			for range maxOptions {
				r.expect([]uint32{repErrUnsup}, 999)
			}
		},
	}
	for name, do := range tests {
		t.Run(name, func(t *testing.T) {
			d := newTestDevice(1 << 20)
			s := serve(t, Config{}, map[string]*Export{"": {Device: d}})
			r := dialRaw(t, s)
			do(r)
			err := s.waitLog(t)
			io.Copy(io.Discard, r)
			t.Log(err)
			if d.data[0] != 0 {
				t.Error("a part of a write was applied")
			}
		})
	}
}

// TestQuietEnds: ends that are no errors.
func TestQuietEnds(t *testing.T) {
	for name, do := range map[string]func(r *raw){
		"port check":  func(r *raw) { r.recv(18); r.Close() },
		"after hello": func(r *raw) { r.greet(3); r.Close() },
		"abort":       func(r *raw) { r.greet(3); r.option(optAbort); r.Close() },
		"disconnect":  func(r *raw) { r.goTo(true); r.request(0, cmdDisc, 0, 0, 0); r.closed() },
		"hang up":     func(r *raw) { r.goTo(false); r.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, Config{}, map[string]*Export{"": {Device: newTestDevice(1 << 20)}})
			do(dialRaw(t, s))
			s.work.Wait()
			if l := s.logged(); len(l) != 0 {
				t.Errorf("logged %v", l)
			}
		})
	}
}

func TestExportName(t *testing.T) {
	d := newTestDevice(1 << 20)
	for i := range d.data {
		d.data[i] = byte(i)
	}
	for flags, padding := range map[uint32]int{0: 124, 1: 124, 2: 0, 3: 0} {
		s := serve(t, Config{}, map[string]*Export{"x": {Device: d}})
		r := dialRaw(t, s)
		r.greet(flags)
		r.option(optExportName, "x")
		b := r.recv(10 + padding)
		if be.Uint64(b) != 1<<20 || be.Uint16(b[8:])&(txHasFlags|txSendFlush|txSendDF) != txHasFlags|txSendFlush {
			t.Errorf("answer %x", b[:10])
		}
		r.request(0, cmdRead, 7, 5, 3)
		r.simple(7, 0)
		if b := r.recv(3); !bytes.Equal(b, []byte{5, 6, 7}) {
			t.Errorf("read %x", b)
		}
	}
}

// TestRefusedRequests: each is answered, and the connection goes on.
func TestRefusedRequests(t *testing.T) {
	d := newTestDevice(64 << 20)
	copy(d.data, noise(1, 1<<20))
	ro := newTestDevice(1 << 20)
	ro.ro = true
	exports := map[string]*Export{
		"rw":     {Device: d, MinBlock: 512},
		"ro":     {Device: ro},
		"forced": {Device: d, ReadOnly: true},
		"plain":  {Device: plain{d}},
	}
	tests := []struct {
		export     string
		flags, cmd uint16
		off        uint64
		n          uint32
		want       Errno
	}{
		{"rw", 0, cmdRead, 64 << 20, 512, EINVAL},
		{"rw", 0, cmdRead, 1<<64 - 512, 1024, EINVAL},
		{"rw", 0, cmdRead, 0, MaxRequest + 512, EINVAL},
		{"rw", 0, cmdRead, 0, 1<<32 - 512, EINVAL},
		{"rw", 0, cmdRead, 1, 512, EINVAL},
		{"rw", cmdFlagNoHole, cmdRead, 0, 512, EINVAL},
		{"rw", 0x8000, cmdRead, 0, 512, EINVAL},
		{"rw", 0, cmdWrite, 64 << 20, 512, ENOSPC},
		{"rw", 0, cmdWrite, 1<<64 - 512, 1024, ENOSPC},
		{"rw", 0, cmdWrite, 512, 100, EINVAL},
		{"rw", 0, cmdWrite, 0, MaxRequest + 512, EINVAL},
		{"rw", cmdFlagReqOne, cmdWrite, 0, 512, EINVAL},
		{"rw", 0, cmdTrim, 64 << 20, 512, EINVAL},
		{"rw", 0, cmdTrim, 0, 511, EINVAL},
		{"rw", 0, cmdWriteZeroes, 64 << 20, 512, ENOSPC},
		{"rw", cmdFlagDF, cmdWriteZeroes, 0, 512, EINVAL},
		{"rw", 0, cmdCache, 64 << 20, 512, EINVAL},
		{"rw", 0, cmdBlockStatus, 64 << 20, 512, EINVAL},
		{"rw", 0, cmdBlockStatus, 0, 0, EINVAL},
		{"rw", 0, 8, 0, 0, EINVAL},
		{"rw", 0, 99, 0, 0, EINVAL},
		{"ro", 0, cmdWrite, 0, 512, EPERM},
		{"ro", 0, cmdTrim, 0, 512, EPERM},
		{"ro", 0, cmdWriteZeroes, 0, 512, EPERM},
		{"forced", 0, cmdWrite, 0, 512, EPERM},
		{"plain", 0, cmdTrim, 0, 512, ENOTSUP},
		{"plain", cmdFlagFastZero, cmdWriteZeroes, 0, 512, EINVAL}, // not advertised
	}
	for _, structured := range []bool{false, true} {
		s := serve(t, Config{}, exports)
		conns := map[string]*raw{}
		for name := range exports {
			r := dialRaw(t, s)
			r.greet(3)
			if structured {
				r.expect([]uint32{repAck}, optStructuredReply)
				r.expect([]uint32{repMetaContext, repAck}, optSetMeta, uint32(len(name)), name, uint32(1), uint32(15), contextAllocation)
			}
			r.expect([]uint32{repInfo, repInfo, repAck}, optGo, uint32(len(name)), name, uint16(0))
			conns[name] = r
		}
		for i, test := range tests {
			r := conns[test.export]
			r.request(test.flags, test.cmd, uint64(i), test.off, test.n)
			if test.cmd == cmdWrite {
				r.send(bytes.Repeat([]byte{0xee}, int(test.n)))
			}
			if structured && (test.cmd == cmdRead || test.cmd == cmdBlockStatus) {
				r.errChunk(uint64(i), test.want)
			} else {
				r.simple(uint64(i), test.want)
			}
		}
		for name, r := range conns {
			r.request(0, cmdFlush, 99, 0, 0)
			r.simple(99, 0)
			r.request(cmdFlagFUA, cmdRead, 100, 0, 0) // FUA is allowed everywhere, and so is nothing
			if structured {
				r.chunk(100, chunkFlagDone, chunkNone)
			} else {
				r.simple(100, 0)
			}
			r.request(0, cmdCache, 101, 0, 512)
			r.simple(101, 0)
			if l := s.logged(); len(l) != 0 {
				t.Errorf("%s: logged %v", name, l)
			}
		}
	}
	if bytes.Contains(d.data, []byte{0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee}) {
		t.Error("a refused write was written")
	}
}

// TestStructuredReads looks at the chunks themselves.
func TestStructuredReads(t *testing.T) {
	d := newTestDevice(8 << 20)
	copy(d.data[1<<20:], noise(3, 1<<20))
	s := serve(t, Config{}, map[string]*Export{"": {Device: d}})
	r := dialRaw(t, s)
	r.goTo(true)
	r.request(0, cmdRead, 1, 512, 4096)
	if b := r.chunk(1, chunkFlagDone, chunkOffsetHole); be.Uint64(b) != 512 || be.Uint32(b[8:]) != 4096 {
		t.Errorf("hole %x", b)
	}
	r.request(0, cmdRead, 2, 0, 3<<20)
	r.chunk(2, 0, chunkOffsetHole)
	if b := r.chunk(2, 0, chunkOffsetData); be.Uint64(b) != 1<<20 || !bytes.Equal(b[8:], d.data[1<<20:2<<20]) {
		t.Error("data in the middle")
	}
	r.chunk(2, chunkFlagDone, chunkOffsetHole)
	r.request(cmdFlagDF, cmdRead, 3, 0, 3<<20)
	if b := r.chunk(3, chunkFlagDone, chunkOffsetData); !bytes.Equal(b[8:], d.data[:3<<20]) {
		t.Error("unfragmented data")
	}
	r.request(cmdFlagDF, cmdRead, 4, 0, MaxRequest+1)
	r.errChunk(4, EOVERFLOW)
	d.fail = func(op string, off, _ int64) error {
		if off >= 1<<20 {
			return errors.New("bad\xffsector")
		}
		return nil
	}
	r.request(0, cmdRead, 5, 0, 2<<20)
	r.chunk(5, 0, chunkOffsetHole)
	b := r.chunk(5, chunkFlagDone, chunkErrorOffset)
	if Errno(be.Uint32(b)) != EIO || be.Uint64(b[len(b)-8:]) != 1<<20 || string(b[6:len(b)-8]) != "badsector" {
		t.Errorf("error %q", b)
	}
}

func TestBlockStatus(t *testing.T) {
	d := newTestDevice(1 << 20)
	for _, u := range []int{2, 3, 7} {
		d.hole[u] = false
	}
	s := serve(t, Config{}, map[string]*Export{"": {Device: d}})
	r := dialRaw(t, s)
	r.goTo(true)
	ask := func(flags uint16, off uint64, n uint32) (out []uint32) {
		r.request(flags, cmdBlockStatus, off, off, n)
		b := r.chunk(off, chunkFlagDone, chunkBlockStatus)
		if be.Uint32(b) != contextID {
			t.Errorf("context %x", b[:4])
		}
		for b = b[4:]; len(b) > 0; b = b[4:] {
			out = append(out, be.Uint32(b))
		}
		return out
	}
	const h = stateHole | stateZero
	if got := ask(0, 0, 1<<20); !slices.Equal(got, []uint32{2 * unit, h, 2 * unit, 0, 3 * unit, h, unit, 0, 8 * unit, h}) {
		t.Errorf("all: %v", got)
	}
	if got := ask(cmdFlagReqOne, 100, 1<<20-100); !slices.Equal(got, []uint32{2*unit - 100, h}) {
		t.Errorf("one: %v", got)
	}
	if got := ask(0, 2*unit+1, 1); !slices.Equal(got, []uint32{1, 0}) {
		t.Errorf("a byte: %v", got)
	}
	d.fail = func(op string, _, _ int64) error { return EIO }
	r.request(0, cmdBlockStatus, 1, 0, 512)
	r.errChunk(1, EIO)
	// Without the context there is no status.
	r = dialRaw(t, s)
	r.goTo(false)
	r.request(0, cmdBlockStatus, 1, 0, 512)
	r.simple(1, EINVAL)
}

// mute maps nothing; a server must not loop or lie then.
type mute struct{ *testDevice }

func (mute) Map(int64, int64, func(off, n int64, zero, hole bool) error) error { return nil }

func TestBlockStatusOfNothing(t *testing.T) {
	s := serve(t, Config{}, map[string]*Export{"": {Device: mute{newTestDevice(1 << 20)}}})
	r := dialRaw(t, s)
	r.goTo(true)
	r.request(0, cmdBlockStatus, 1, 0, 512)
	r.errChunk(1, EIO)
}

// TestFlushIsReal counts: each FLUSH and FUA costs one, and its answer comes
// after it.
func TestFlushIsReal(t *testing.T) {
	d := newTestDevice(1 << 20)
	s := serve(t, Config{}, map[string]*Export{"": {Device: d}})
	r := dialRaw(t, s)
	r.goTo(true)
	want := int64(0)
	for i, c := range []struct {
		flags, cmd uint16
		n          uint32
		flushes    int64
	}{
		{0, cmdWrite, 512, 0},
		{cmdFlagFUA, cmdWrite, 512, 1},
		{0, cmdFlush, 0, 1},
		{0, cmdTrim, 512, 0},
		{cmdFlagFUA, cmdTrim, 512, 1},
		{0, cmdWriteZeroes, 512, 0},
		{cmdFlagFUA | cmdFlagNoHole, cmdWriteZeroes, 512, 1},
		{cmdFlagFUA | cmdFlagFastZero, cmdWriteZeroes, 512, 1},
	} {
		r.request(c.flags, c.cmd, uint64(i), 0, c.n)
		if c.cmd == cmdWrite {
			r.send(make([]byte, c.n))
		}
		r.simple(uint64(i), 0)
		if want += c.flushes; d.flushes.Load() != want {
			t.Errorf("step %d: %d flushes, want %d", i, d.flushes.Load(), want)
		}
	}
	d.fail = func(op string, _, _ int64) error {
		if op == "flush" {
			return errors.New("the disk has no power")
		}
		return nil
	}
	r.request(cmdFlagFUA, cmdWrite, 50, 0, 1, 1)
	r.simple(50, EIO)
}
