package link

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farside/internal/dr"
	"farside/internal/frame"
)

var update = flag.Bool("update", false, "write the golden files anew")

// The bytes of each message are those of docs/format/link.md, for ever.
func TestGoldenMessages(t *testing.T) {
	cursor := frame.Cursor{
		Machine: dr.MachineID{0xaa, 1}, Position: dr.Position{Timeline: 3, Seq: 0x1122334455667788}, Time: 0x0102030405060708,
		Chain: [32]byte{0xc0, 31: 0xc1},
	}
	var text strings.Builder
	for _, m := range []struct {
		name  string
		bytes []byte
	}{
		{"hello", Hello{Machine: dr.MachineID{0xaa, 1}, Timeline: 3}.encode()},
		{"hello with boot", Hello{Machine: dr.MachineID{0xaa, 1}, Timeline: 3, Boot: Boot{[16]byte{0xb0, 15: 0xb1}, 0x1234 * time.Millisecond}}.encode()},
		{"welcome", encodeWelcome(cursor, 0x99)},
		{"refuse", (&Refused{Code: CodeNotReady, RetryAfter: 1500 * time.Millisecond, Text: "später"}).encode()},
		{"ack", Ack{Stored: 0x1234, Durable: 0x12}.encode()},
		{"ping", message(msgPing, nil)},
		{"call", bytes.Join(encodeCall(0x01020304, CallBarrier, []byte("hold")), nil)},
		{"answer", bytes.Join(encodeAnswer(0x01020304, answer{body: []byte("held")}), nil)},
		{"answer of failure", bytes.Join(encodeAnswer(5, answer{err: &Refused{Code: CodeFull, Text: "full"}}), nil)},
	} {
		fmt.Fprintf(&text, "%s\n%s", m.name, hex.Dump(m.bytes))
	}
	name := filepath.Join("testdata", "messages.golden")
	if *update {
		if err := os.WriteFile(name, []byte(text.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if text.String() != string(want) {
		t.Errorf("messages differ from %s:\n%s", name, text.String())
	}
}

func TestMessagesRoundTrip(t *testing.T) {
	cursor := origin
	cursor.Position.Seq, cursor.Time, cursor.Chain = 7, -1, [32]byte{1, 2, 3}
	read := func(b []byte) (msgType, []byte) {
		typ, body, err := readMessage(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		return typ, body
	}
	if _, b := read(hello.encode()); mustOne(parseHello(b)) != hello {
		t.Error("hello")
	}
	booted := hello
	booted.Boot = Boot{ID: [16]byte{5}, Up: time.Minute}
	_, b := read(booted.encode())
	if mustOne(parseHello(b)) != booted {
		t.Error("hello with boot")
	}
	b[helloSize+bootSize-1] = 0x80
	if _, err := parseHello(b); !errors.Is(err, dr.ErrCorrupt) {
		t.Errorf("a boot of the far past: %v", err)
	}
	if _, err := parseHello(b[:helloSize+1]); !errors.Is(err, dr.ErrCorrupt) {
		t.Errorf("half a boot: %v", err)
	}
	_, b = read(encodeWelcome(cursor, 5))
	if c, durable, err := parseWelcome(b); c != cursor || durable != 5 || err != nil {
		t.Errorf("welcome %+v %d %v", c, durable, err)
	}
	if _, b := read(Ack{3, 2}.encode()); mustOne(parseAck(b)) != (Ack{3, 2}) {
		t.Error("ack")
	}
	long := &Refused{Code: CodeTimeline, RetryAfter: time.Minute, Text: strings.Repeat("ä", maxText)}
	_, b = read(long.encode())
	if r := mustOne(parseRefuse(b)); r.Code != long.Code || r.RetryAfter != long.RetryAfter || len(r.Text) != maxText {
		t.Errorf("refuse %+v", r)
	}
	for _, bad := range [][]byte{
		{9, 0, 0, 0, 0, 0, 0, 0}, {6, 1, 0, 0, 0, 0, 0, 0}, {6, 0, 0, 0, 1, 0, 0, 0, 0}, {5, 0, 0, 0, 15, 0, 0, 0},
	} {
		if _, _, err := readMessage(bytes.NewReader(bad)); err == nil {
			t.Errorf("%x was read", bad)
		}
	}
}

func mustOne[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
