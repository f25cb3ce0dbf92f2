package nbd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// script is a connection that receives fixed bytes and swallows what is sent.
type script struct{ in io.Reader }

func (s *script) Read(p []byte) (int, error)       { return s.in.Read(p) }
func (s *script) Write(p []byte) (int, error)      { return len(p), nil }
func (s *script) Close() error                     { return nil }
func (s *script) LocalAddr() net.Addr              { return nil }
func (s *script) RemoteAddr() net.Addr             { return nil }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

func opt(opt uint32, typ uint32, data ...byte) string {
	b := be.AppendUint64(nil, magicOptReply)
	b = be.AppendUint32(b, opt)
	b = be.AppendUint32(b, typ)
	b = be.AppendUint32(b, uint32(len(data)))
	return string(append(b, data...))
}

const hello = "NBDMAGICIHAVEOPT\x00\x03"

func exportInfo(size uint64) string {
	b := be.AppendUint64([]byte{0, infoExport}, size)
	return opt(optGo, repInfo, append(b, 0, txHasFlags)...)
}

// TestHostileHandshake: what a server may not say.
func TestHostileHandshake(t *testing.T) {
	ack := opt(optStructuredReply, repAck)
	pre := hello + ack + opt(optSetMeta, repAck)
	blocks := func(lo, hi uint32) string {
		b := be.AppendUint32([]byte{0, infoBlockSize}, lo)
		return opt(optGo, repInfo, be.AppendUint32(be.AppendUint32(b, 4096), hi)...)
	}
	for name, in := range map[string]string{
		"nothing":          "",
		"http":             "HTTP/1.0 400 Bad Request\r\n\r\n",
		"old style":        "NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53" + strings.Repeat("\x00", 200),
		"not fixed":        "NBDMAGICIHAVEOPT\x00\x02",
		"silence":          hello,
		"wrong option":     hello + opt(optGo, repAck),
		"bad magic":        hello + strings.Repeat("x", 20),
		"huge reply":       hello + opt(optStructuredReply, repAck)[:16] + "\xff\xff\xff\xff",
		"half reply":       hello + opt(optStructuredReply, repErrUnsup, 1, 2, 3)[:22],
		"info for no data": hello + opt(optStructuredReply, repInfo),
		"bad context":      hello + ack + opt(optSetMeta, repMetaContext, 1),
		"no size":          pre + opt(optGo, repAck),
		"negative size":    pre + exportInfo(1<<63) + opt(optGo, repAck),
		"short info":       pre + opt(optGo, repInfo, 0),
		"short export":     pre + opt(optGo, repInfo, 0, infoExport, 1),
		"no info":          pre + opt(optGo, repServer, 0, 0, 0, 0),
		"blocks of 0":      pre + exportInfo(1) + blocks(0, 1<<20),
		"blocks of 3":      pre + exportInfo(1) + blocks(3, 1<<20),
		"max below min":    pre + exportInfo(1) + blocks(512, 1),
		"refused":          pre + opt(optGo, repErrPolicy, 110, 111, 0xff),
	} {
		c, err := NewClient(t.Context(), &script{strings.NewReader(in)}, "x")
		if err == nil {
			t.Errorf("%s was taken", name)
			c.Close()
		}
	}
	// A server that talks for ever ends some time, too.
	endless := io.MultiReader(strings.NewReader(pre), &repeat{opt(optGo, repInfo, 0, 99)})
	if _, err := NewClient(t.Context(), &script{endless}, "x"); err == nil {
		t.Error("endless information")
	}
}

type repeat struct{ s string }

func (r *repeat) Read(p []byte) (int, error) { return copy(p, r.s), nil }

func TestDialTimeout(t *testing.T) {
	mine, its := net.Pipe()
	defer its.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := NewClient(ctx, mine, ""); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func chunkOf(flags, typ uint16, handle uint64, body ...byte) string {
	b := make([]byte, chunkSize)
	putChunk(b, flags, typ, handle, uint32(len(body)))
	return string(b) + string(body)
}

// replyClient is a client in the transmission phase with three calls in
// flight: 1 reads 16 bytes at 100, 2 asks for status, 3 flushes.
func replyClient(in []byte) (*Client, []*call) {
	c := &Client{
		conn: &script{}, r: bufio.NewReaderSize(bytes.NewReader(in), 4096), size: 1 << 20,
		structured: true, allocation: true, contextID: 5, minBlock: 1, maxBlock: MaxRequest, done: make(chan struct{}),
	}
	calls := []*call{
		{req: request{cmd: cmdRead, offset: 100, length: 16, handle: 1}, p: make([]byte, 16), done: make(chan struct{})},
		{req: request{cmd: cmdBlockStatus, length: 512, handle: 2}, done: make(chan struct{})},
		{req: request{cmd: cmdFlush, handle: 3}, done: make(chan struct{})},
	}
	c.mu.calls = map[uint64]*call{}
	for _, k := range calls {
		c.mu.calls[k.req.handle] = k
	}
	return c, calls
}

func at(off uint64, data ...byte) []byte { return append(be.AppendUint64(nil, off), data...) }

// TestHostileReplies: broken is what ends the connection, failed what only
// fails the call.
func TestHostileReplies(t *testing.T) {
	hole := func(off uint64, n uint32) []byte { return be.AppendUint32(at(off), n) }
	data := func(off uint64, n int) string {
		return chunkOf(0, chunkOffsetData, 1, at(off, make([]byte, n)...)...)
	}
	status := func(id uint32, words ...uint32) []byte {
		b := be.AppendUint32(nil, id)
		for _, w := range words {
			b = be.AppendUint32(b, w)
		}
		return b
	}
	simple := func(handle uint64, e Errno) string {
		b := make([]byte, simpleSize)
		putSimple(b, e, handle)
		return string(b)
	}
	broken := map[string]string{
		"magic":            strings.Repeat("x", 30),
		"handle":           simple(9, 0),
		"chunk handle":     chunkOf(1, chunkNone, 9),
		"simple for read":  simple(1, 0) + strings.Repeat("x", 16),
		"data below":       data(99, 4),
		"data above":       data(110, 7),
		"data far":         data(1<<63, 7),
		"data twice":       data(100, 8) + data(107, 1),
		"empty data":       data(100, 0),
		"hole of nothing":  chunkOf(0, chunkOffsetHole, 1, hole(100, 0)...),
		"hole too long":    chunkOf(0, chunkOffsetHole, 1, hole(100, 17)...),
		"hole short":       chunkOf(0, chunkOffsetHole, 1, 1, 2, 3),
		"none with body":   chunkOf(1, chunkNone, 1, 1),
		"unknown type":     chunkOf(1, 77, 1),
		"data for status":  chunkOf(1, chunkOffsetData, 2, at(0, 1)...),
		"status for read":  chunkOf(1, chunkBlockStatus, 1, status(5, 512, 0)...),
		"status context":   chunkOf(1, chunkBlockStatus, 2, status(6, 512, 0)...),
		"status empty":     chunkOf(1, chunkBlockStatus, 2, status(5, 0, 0)...),
		"status without":   chunkOf(1, chunkBlockStatus, 2, status(5)...),
		"status odd":       chunkOf(1, chunkBlockStatus, 2, status(5, 1)...),
		"status twice":     strings.Repeat(chunkOf(0, chunkBlockStatus, 2, status(5, 1, 0)...), 2),
		"short error":      chunkOf(1, chunkError, 1, 1, 2),
		"error without":    chunkOf(1, chunkError, 1, 0, 0, 0, 0, 0, 0),
		"error text":       chunkOf(1, chunkError, 1, 0, 0, 0, 5, 0, 9, 'x'),
		"huge error":       chunkOf(1, chunkError, 1, make([]byte, maxErrorChunk+1)...),
		"half data":        data(100, 16)[:30],
		"half chunk":       data(100, 16)[:17],
		"half hole":        chunkOf(0, chunkOffsetHole, 1, hole(100, 1)...)[:25],
		"half status":      chunkOf(1, chunkBlockStatus, 2, status(5, 512, 0)...)[:25],
		"half error":       chunkOf(1, chunkError, 1, 0, 0, 0, 5, 0, 0)[:23],
		"half data offset": data(100, 16)[:24],
	}
	for name, in := range broken {
		c, calls := replyClient([]byte(in))
		err := c.replies()
		if err == nil || strings.HasSuffix(err.Error(), "EOF") != strings.HasPrefix(name, "half") {
			t.Errorf("%s: %v", name, err)
		}
		c.fail(err)
		for _, k := range calls {
			if <-k.done; k.err == nil {
				t.Errorf("%s: a call succeeded", name)
			}
		}
	}
	failed := map[string]struct {
		in   string
		call int
		want error
	}{
		"simple":        {simple(3, ENOSPC), 2, ENOSPC},
		"text":          {chunkOf(1, chunkError, 1, 0, 0, 0, 12, 0, 2, 'h', 'i'), 0, ENOMEM},
		"offset":        {chunkOf(1, chunkErrorOffset, 1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 100), 0, EIO},
		"unknown error": {chunkOf(1, chunkError|4, 1, 0, 0, 0, 77, 0, 0), 0, Errno(77)},
		"first error":   {chunkOf(0, chunkError, 1, 0, 0, 0, 1, 0, 0) + chunkOf(1, chunkError, 1, 0, 0, 0, 5, 0, 0), 0, EPERM},
		"a part only":   {data(100, 8) + chunkOf(1, chunkNone, 1), 0, EIO},
		"no data":       {chunkOf(1, chunkNone, 1), 0, EIO},
		"no status":     {chunkOf(1, chunkNone, 2), 1, EIO},
		"good":          {data(108, 8) + data(100, 4) + chunkOf(1, chunkOffsetHole, 1, hole(104, 4)...), 0, nil},
		"good status":   {chunkOf(1, chunkBlockStatus, 2, status(5, 512, 0)...), 1, nil},
	}
	for name, test := range failed {
		c, calls := replyClient([]byte(test.in))
		err := c.replies()
		k := calls[test.call]
		select {
		case <-k.done:
		default:
			t.Errorf("%s: not answered: %v", name, err)
			continue
		}
		if !errors.Is(k.err, test.want) || (k.err == nil) != (test.want == nil) {
			t.Errorf("%s: %v, want %v", name, k.err, test.want)
		}
		if k.err != nil && k.err.Error() == "" {
			t.Errorf("%s: no text", name)
		}
	}
}

// TestCovered compares with a set of bytes.
func TestCovered(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s covered
		var model [64]bool
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			start := rapid.IntRange(0, 62).Draw(t, "start")
			end := rapid.IntRange(start+1, 63).Draw(t, "end")
			overlaps := bytes.ContainsRune(bytesOf(model[start:end]), 1)
			if s.add(int64(start), int64(end)) == overlaps {
				t.Fatalf("add [%d,%d) to %v: overlaps %v", start, end, s, overlaps)
			}
			if !overlaps {
				for i := start; i < end; i++ {
					model[i] = true
				}
			}
		}
		if n := int64(bytes.Count(bytesOf(model[:]), []byte{1})); s.bytes() != n {
			t.Fatalf("%v has %d bytes, want %d", s, s.bytes(), n)
		}
		for i := 1; i < len(s); i++ {
			if s[i-1][1] >= s[i][0] {
				t.Fatalf("not disjoint or not joined: %v", s)
			}
		}
	})
}

func bytesOf(b []bool) []byte {
	out := make([]byte, len(b))
	for i, v := range b {
		if v {
			out[i] = 1
		}
	}
	return out
}

// FuzzServer feeds a server bytes, once as a whole connection, once behind a
// proper handshake.
func FuzzServer(f *testing.F) {
	greet := "\x00\x00\x00\x03"
	option := func(opt uint32, data ...byte) string {
		b := be.AppendUint64(nil, magicOption)
		b = be.AppendUint32(b, opt)
		return string(append(be.AppendUint32(b, uint32(len(data))), data...))
	}
	meta := append([]byte{0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 15}, contextAllocation...)
	chosen := greet + option(optStructuredReply) + option(optSetMeta, meta...) + option(optGo, make([]byte, 6)...)
	requests := ""
	for cmd := range uint16(9) {
		b := make([]byte, requestSize)
		q := request{cmd: cmd, flags: cmdFlagFUA, handle: uint64(cmd), offset: 512, length: 1024}
		if cmd == cmdDisc {
			continue
		}
		q.put(b)
		if requests += string(b); cmd == cmdWrite {
			requests += strings.Repeat("w", 1024)
		}
	}
	f.Add([]byte(greet+option(optList)+option(optExportName)+requests), false)
	f.Add([]byte(greet+option(optInfo, 0, 0, 0, 0, 0, 1, 0, 3)+option(optListMeta, meta...)+option(optStartTLS)+option(optAbort)), false)
	f.Add([]byte(requests), true)
	s, err := NewServer(Config{
		Lookup: func(string) (*Export, error) { return &Export{Device: newTestDevice(256 << 10)}, nil },
		List:   func() []string { return []string{"a"} },
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, in []byte, afterHandshake bool) {
		if afterHandshake {
			in = append([]byte(chosen), in...)
		}
		s.ServeConn(&script{bytes.NewReader(in)}) // ends, and doesn't panic
		if n := int64(2 * MaxRequest); !s.mem.budget.TryAcquire(max(n, 256<<20)) {
			t.Fatal("memory was not given back")
		}
		s.mem.budget.Release(256 << 20)
	})
}

// FuzzClient feeds a client replies, in the handshake and behind it.
func FuzzClient(f *testing.F) {
	pre := hello + opt(optStructuredReply, repAck) + opt(optSetMeta, repMetaContext, append([]byte{0, 0, 0, 5}, contextAllocation...)...) + opt(optSetMeta, repAck)
	f.Add([]byte(pre+exportInfo(1<<20)+opt(optGo, repAck)), true)
	f.Add([]byte(chunkOf(0, chunkOffsetData, 1, at(100, make([]byte, 8)...)...)+chunkOf(1, chunkOffsetHole, 1, append(at(108), 0, 0, 0, 8)...)), false)
	f.Add([]byte(chunkOf(1, chunkBlockStatus, 2, 0, 0, 0, 5, 0, 0, 2, 0, 0, 0, 0, 3)+chunkOf(1, chunkError, 3, 0, 0, 0, 5, 0, 1, 'x')), false)
	f.Fuzz(func(t *testing.T, in []byte, handshake bool) {
		if handshake {
			if c, err := NewClient(t.Context(), &script{bytes.NewReader(in)}, "x"); err == nil {
				c.Close()
			}
			return
		}
		c, calls := replyClient(in)
		c.fail(c.replies())
		for _, k := range calls {
			<-k.done
			if k.err == nil && k.req.cmd == cmdRead && k.got.bytes() != 16 {
				t.Fatal("a read succeeded without its data")
			}
		}
	})
}
