package compare

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"farside/internal/dr"
)

var update = flag.Bool("update", false, "write the golden file anew")

// sample asks about five blocks, the last of them short.
func sample() *Request {
	r := &Request{
		Disk: 3, Shift: 16, Floor: dr.Position{Timeline: 2, Seq: 0x1122334455667788}, First: 0x0102,
		Length: 4<<16 + 1024, Key: Key{0xaa, 31: 0xbb},
	}
	h := NewHasher(r.Key)
	r.Add(Data, h.Sum([]byte("first")))
	r.Add(Zero, Sum{})
	r.Add(Skip, Sum{})
	r.Add(Data, h.Sum(bytes.Repeat([]byte{7}, 1<<16)))
	r.Add(Zero, Sum{})
	return r
}

func sampleAnswer() *Answer {
	a := NewAnswer(dr.Position{Timeline: 2, Seq: 0x1122334455667799}, 5)
	a.Set(0)
	a.Set(4)
	return a
}

// The bytes are those of docs/format/compare.md, for ever.
func TestGolden(t *testing.T) {
	q, err := sample().Encode()
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("request\n%sanswer\n%s", hex.Dump(q), hex.Dump(sampleAnswer().Encode()))
	name := filepath.Join("testdata", "messages.golden")
	if *update {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if text != string(want) {
		t.Errorf("messages differ from %s:\n%s", name, text)
	}
}

func TestRoundTrip(t *testing.T) {
	r := sample()
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseRequest(b)
	if err != nil || !reflect.DeepEqual(got, r) {
		t.Fatalf("got %+v, %v", got, err)
	}
	if x := got.Block(4); x != (dr.Extent{Disk: 3, Offset: 0x0106 << 16, Length: 1024}) {
		t.Errorf("last block %v", x)
	}
	a, err := ParseAnswer(r, sampleAnswer().Encode())
	if err != nil || !a.Any() || !a.Differs(0) || a.Differs(1) || !a.Differs(4) || a.Blocks() != 5 {
		t.Errorf("answer %+v, %v", a, err)
	}
	if NewAnswer(r.Floor, 5).Any() {
		t.Error("an empty answer says that something differs")
	}
}

// Each damage is refused with the right kind.
func TestDamagedRequests(t *testing.T) {
	whole, err := sample().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		want   error
		damage func(b []byte) []byte
	}{
		"magic":          {dr.ErrCorrupt, func(b []byte) []byte { b[0]++; return b }},
		"version":        {dr.ErrVersion, func(b []byte) []byte { b[4]++; return b }},
		"short":          {dr.ErrCorrupt, func(b []byte) []byte { return b[:len(b)-1] }},
		"long":           {dr.ErrCorrupt, func(b []byte) []byte { return append(b, 0) }},
		"header only":    {dr.ErrCorrupt, func(b []byte) []byte { return b[:requestHeader-1] }},
		"small blocks":   {dr.ErrInvalid, func(b []byte) []byte { b[8] = MinShift - 1; return b }},
		"huge blocks":    {dr.ErrInvalid, func(b []byte) []byte { b[8] = 255; return b }},
		"reserved":       {dr.ErrCorrupt, func(b []byte) []byte { b[9] = 1; return b }},
		"reserved word":  {dr.ErrCorrupt, func(b []byte) []byte { b[45] = 1; return b }},
		"first block":    {dr.ErrInvalid, func(b []byte) []byte { b[31] = 0x80; return b }},
		"far block":      {dr.ErrInvalid, func(b []byte) []byte { b[31] = 0x7f; return b }},
		"no length":      {dr.ErrInvalid, func(b []byte) []byte { clear(b[32:40]); return b }},
		"huge length":    {dr.ErrInvalid, func(b []byte) []byte { b[36] = 1; return b }},
		"part of sector": {dr.ErrInvalid, func(b []byte) []byte { b[32]++; return b }},
		"too many sums":  {dr.ErrCorrupt, func(b []byte) []byte { b[40] = 255; b[43] = 255; return b }},
		"sums missing":   {dr.ErrCorrupt, func(b []byte) []byte { b[40]--; return b[:len(b)-SumSize] }},
		"unknown kind":   {dr.ErrCorrupt, func(b []byte) []byte { b[requestHeader] |= 3 << 2; return b }},
		"kind behind":    {dr.ErrCorrupt, func(b []byte) []byte { b[requestHeader+1] |= 1 << 2; return b }},
	} {
		if _, err := ParseRequest(c.damage(bytes.Clone(whole))); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func TestDamagedAnswers(t *testing.T) {
	whole := sampleAnswer().Encode()
	for name, c := range map[string]struct {
		want   error
		damage func(b []byte) []byte
	}{
		"magic":        {dr.ErrCorrupt, func(b []byte) []byte { b[0]++; return b }},
		"version":      {dr.ErrVersion, func(b []byte) []byte { b[4]++; return b }},
		"short":        {dr.ErrCorrupt, func(b []byte) []byte { return b[:len(b)-1] }},
		"reserved":     {dr.ErrCorrupt, func(b []byte) []byte { b[6] = 1; return b }},
		"other blocks": {dr.ErrCorrupt, func(b []byte) []byte { b[12]++; return b }},
		"all blocks":   {dr.ErrCorrupt, func(b []byte) []byte { b[15] = 0xff; return b }},
		"too early":    {dr.ErrCorrupt, func(b []byte) []byte { b[23] = 0; return b }},
		"timeline":     {dr.ErrCorrupt, func(b []byte) []byte { b[8]++; return b }},
		"bit behind":   {dr.ErrCorrupt, func(b []byte) []byte { b[len(b)-1] |= 1 << 5; return b }},
	} {
		if _, err := ParseAnswer(sample(), c.damage(bytes.Clone(whole))); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func TestEncodeRefuses(t *testing.T) {
	for name, change := range map[string]func(*Request){
		"a block missing": func(r *Request) { r.Kinds = r.Kinds[1:] },
		"too long":        func(r *Request) { r.Length = MaxBytes + 512 },
		"too many blocks": func(r *Request) { r.Shift, r.Length = MinShift, (MaxSums+1)<<MinShift },
	} {
		r := sample()
		change(r)
		if _, err := r.Encode(); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The same bytes have other hashes under another key, and the largest request fits a call.
func TestKeyAndSize(t *testing.T) {
	b := []byte(strings.Repeat("x", 4096))
	one, other, again := NewHasher(Key{1}).Sum(b), NewHasher(Key{2}).Sum(b), NewHasher(Key{1}).Sum(b)
	if one == other || one != again {
		t.Error("the key does not matter, or more than it matters")
	}
	r := &Request{Shift: 15, Length: MaxSums << 15}
	for range MaxSums {
		r.Add(Data, Sum{1})
	}
	got, err := r.Encode()
	if err != nil || len(got) > 1<<20 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestIsZero(t *testing.T) {
	for _, n := range []int{0, 1, 63, 64, 65, 4096, 5000} {
		b := make([]byte, n)
		if !IsZero(b) {
			t.Errorf("%d zeroes are not zero", n)
		}
		for i := range b {
			if b[i] = 1; IsZero(b) {
				t.Errorf("%d bytes with a one at %d are zero", n, i)
			}
			b[i] = 0
		}
	}
}

func FuzzMessages(f *testing.F) {
	b, err := sample().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(sampleAnswer().Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := ParseRequest(b); err == nil {
			again, err := r.Encode()
			if err != nil || !bytes.Equal(again, b) {
				t.Errorf("request of %d bytes became %d: %v", len(b), len(again), err)
			}
			last := r.Block(r.Blocks() - 1)
			if last.Length <= 0 || last.End() != r.Offset()+r.Length {
				t.Errorf("last block %v of %+v", last, r)
			}
		}
		if a, err := ParseAnswer(sample(), b); err == nil && !bytes.Equal(a.Encode(), b) {
			t.Error("answer changed")
		}
	})
}
