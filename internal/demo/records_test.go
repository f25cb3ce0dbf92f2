package demo

import (
	"bytes"
	"context"
	"io"
	"strings"
	"testing"
)

// memory is a disk in memory that counts flushes.
type memory struct {
	b       []byte
	flushes int
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(m.b).ReadAt(p, off) }

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > int64(len(m.b)) {
		return 0, io.ErrShortWrite
	}
	return copy(m.b[off:], p), nil
}
func (m *memory) Flush() error { m.flushes++; return nil }

func filled(t *testing.T, n int64) (*memory, int64) {
	t.Helper()
	size := (n + 3) * recordSize
	m := &memory{b: make([]byte, size)}
	var log strings.Builder
	if err := loadRecords(t.Context(), m, n*recordSize, 0, &log); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Count(log.String(), "\n"); int64(lines) != n || int64(m.flushes) != n {
		t.Fatalf("%d lines and %d flushes for %d records", lines, m.flushes, n)
	}
	return m, size
}

func TestRecordsAreFound(t *testing.T) {
	m, size := filled(t, 20)
	v, err := checkRecords(m, size)
	if err != nil || !v.OK || v.Rows != 20 {
		t.Errorf("got %+v, %v", v, err)
	}
}

// TestRecordsThatAreWrong shows that the check has power.
func TestRecordsThatAreWrong(t *testing.T) {
	for name, spoil := range map[string]func(m *memory){
		"one dropped":        func(m *memory) { clear(m.b[5*recordSize : 6*recordSize]) },
		"one byte":           func(m *memory) { m.b[7*recordSize+100] ^= 1 },
		"a byte behind":      func(m *memory) { m.b[21*recordSize+9] = 1 },
		"two exchanged":      func(m *memory) { copy(m.b[3*recordSize:4*recordSize], m.b[4*recordSize:]) },
		"garbage at the end": func(m *memory) { copy(m.b[20*recordSize:], "garbage") },
		"nothing":            func(m *memory) { clear(m.b) },
	} {
		t.Run(name, func(t *testing.T) {
			m, size := filled(t, 20)
			spoil(m)
			v, err := checkRecords(m, size)
			if err != nil || v.OK || v.What == "" {
				t.Errorf("got %+v, %v", v, err)
			}
		})
	}
}

func TestLoadRecordsEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	m := &memory{b: make([]byte, 10*recordSize)}
	if err := loadRecords(ctx, m, int64(len(m.b)), 1, io.Discard); err != nil || m.flushes != 0 {
		t.Errorf("%d records after the end, %v", m.flushes, err)
	}
}

func TestSumsFindDifferences(t *testing.T) {
	buf := make([]byte, blockSum)
	a := &memory{b: make([]byte, 3*blockSum+512)}
	sumsOf := func(size int) [][32]byte {
		s, err := sums(t.Context(), a, int64(size), buf)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := sumsOf(len(a.b))
	if differing(before, sumsOf(len(a.b))) != -1 {
		t.Error("equal disks differ")
	}
	if differing(before, sumsOf(2*blockSum)) != 2 {
		t.Error("a shorter disk is equal")
	}
	a.b[3*blockSum+511] = 1
	if got := differing(before, sumsOf(len(a.b))); got != 3 {
		t.Errorf("first difference in block %d, want 3", got)
	}
}
