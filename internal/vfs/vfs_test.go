package vfs

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"path"
	"runtime"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// every implementation, each rooted in a fresh directory.
func implementations(t *testing.T) map[string]func() (FS, string) {
	return map[string]func() (FS, string){
		"os":  func() (FS, string) { return OS(), t.TempDir() },
		"mem": func() (FS, string) { return NewMem(), "/" },
		"fault": func() (FS, string) {
			return NewFault(NewMem(), func(Op) error { return nil }), "/"
		},
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func write(t testing.TB, fsys FS, name, data string) {
	t.Helper()
	f := must(fsys.Create(name))
	must(f.WriteAt([]byte(data), 0))
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, fsys FS, name string) string {
	t.Helper()
	return string(must(ReadFile(fsys, name, 1<<20)))
}

func TestConformance(t *testing.T) {
	for name, make := range implementations(t) {
		t.Run(name+"/files", func(t *testing.T) { testFiles(t, make) })
		t.Run(name+"/names", func(t *testing.T) { testNames(t, make) })
		t.Run(name+"/holes", func(t *testing.T) { testHoles(t, make) })
		t.Run(name+"/replace", func(t *testing.T) { testReplace(t, make) })
		t.Run(name+"/random", func(t *testing.T) { testRandom(t, make) })
	}
}

func testFiles(t *testing.T, make func() (FS, string)) {
	fsys, dir := make()
	name := path.Join(dir, "a")
	f := must(fsys.Create(name))
	must(f.WriteAt([]byte("hello"), 4094)) // across a page
	if size := must(f.Size()); size != 4099 {
		t.Errorf("size %d", size)
	}
	buf := []byte("xxxxxxxxxx")
	if n, err := f.ReadAt(buf, 4092); n != 7 || !errors.Is(err, io.EOF) || string(buf[:7]) != "\x00\x00hello" {
		t.Errorf("read %d %v %q", n, err, buf)
	}
	if n, err := f.ReadAt(buf, 5000); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("read behind the end: %d %v", n, err)
	}
	if err := errors.Join(f.Truncate(4096), f.Truncate(4099)); err != nil {
		t.Fatal(err)
	}
	if f.ReadAt(buf[:5], 4094); string(buf[:5]) != "he\x00\x00\x00" {
		t.Errorf("after truncating and growing: %q", buf[:5])
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(buf, 0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("read of a closed file: %v", err)
	}
	r := must(fsys.Open(name))
	defer r.Close()
	if _, err := r.WriteAt(buf, 0); err == nil {
		t.Error("wrote to a file opened for reading")
	}
	w := must(fsys.OpenFile(name))
	defer w.Close()
	must(w.WriteAt([]byte("J"), 4094))
	if r.ReadAt(buf[:2], 4094); string(buf[:2]) != "Je" {
		t.Errorf("the other handle reads %q", buf[:2])
	}
	must(fsys.Create(name)).Close()
	if size := must(r.Size()); size != 0 {
		t.Errorf("size after creating anew: %d", size)
	}
}

func testNames(t *testing.T, make func() (FS, string)) {
	fsys, dir := make()
	sub := path.Join(dir, "x", "y")
	if err := fsys.MkdirAll(sub); err != nil {
		t.Fatal(err)
	}
	write(t, fsys, path.Join(sub, "b"), "b")
	write(t, fsys, path.Join(sub, "a"), "a")
	if got := must(fsys.List(sub)); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("list %v", got)
	}
	if err := fsys.Rename(path.Join(sub, "a"), path.Join(sub, "b")); err != nil || read(t, fsys, path.Join(sub, "b")) != "a" {
		t.Errorf("rename: %v", err)
	}
	if err := fsys.Rename(path.Join(sub, "b"), path.Join(dir, "c")); err != nil || read(t, fsys, path.Join(dir, "c")) != "a" {
		t.Errorf("rename to another directory: %v", err)
	}
	if info := must(fsys.Stat(path.Join(dir, "c"))); info.Size != 1 || info.Dir || !must(fsys.Stat(sub)).Dir {
		t.Errorf("stat %+v", info)
	}
	for what, err := range map[string]error{
		"stat": second(fsys.Stat(path.Join(sub, "b"))), "open": second(fsys.Open(path.Join(sub, "b"))),
		"openfile": second(fsys.OpenFile(path.Join(sub, "b"))), "remove": fsys.Remove(path.Join(sub, "b")),
		"list": second(fsys.List(path.Join(dir, "none"))), "create": second(fsys.Create(path.Join(dir, "none", "f"))),
		"rename": fsys.Rename(path.Join(sub, "b"), path.Join(sub, "c")),
	} {
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s of what is not there: %v", what, err)
		}
	}
	if err := fsys.Remove(path.Join(dir, "x")); err == nil {
		t.Error("removed a directory that is not empty")
	}
	if err := errors.Join(fsys.SyncDir(dir), fsys.RemoveAll(path.Join(dir, "x")), fsys.RemoveAll(path.Join(dir, "x"))); err != nil {
		t.Error(err)
	}
	lock := must(fsys.Lock(path.Join(dir, "lock")))
	if _, err := fsys.Lock(path.Join(dir, "lock")); err == nil {
		t.Error("locked twice")
	}
	lock.Close()
	must(fsys.Lock(path.Join(dir, "lock"))).Close()
}

func second[T any](_ T, err error) error { return err }

func testHoles(t *testing.T, make func() (FS, string)) {
	fsys, dir := make()
	f := must(fsys.Create(path.Join(dir, "sparse")))
	defer f.Close()
	if err := f.Truncate(4 << 20); err != nil {
		t.Fatal(err)
	}
	must(f.WriteAt(bytes.Repeat([]byte{1}, 256<<10), 1<<20))
	if err := PunchHole(f, 1<<20+100, 128<<10); err != nil {
		t.Fatal(err)
	}
	b := make8(256 << 10)
	must(f.ReadAt(b, 1<<20))
	want := bytes.Repeat([]byte{1}, 256<<10)
	clear(want[100 : 100+128<<10])
	if !bytes.Equal(b, want) {
		t.Error("the hole is not where it was punched")
	}
	var data int64
	for off := int64(0); ; {
		start, end, err := NextData(f, off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil || start < off || end <= start {
			t.Fatalf("next data after %d: [%d,%d) %v", off, start, end, err)
		}
		data += end - start
		off = end
	}
	if data < 128<<10 {
		t.Errorf("%d bytes of data found", data)
	}
}

func make8(n int) []byte { return make([]byte, n) }

func testReplace(t *testing.T, make func() (FS, string)) {
	fsys, dir := make()
	name := path.Join(dir, "state")
	for _, text := range []string{"one", "three"} {
		if err := ReplaceFile(fsys, dir, name, []byte(text)); err != nil || read(t, fsys, name) != text {
			t.Errorf("replace: %v", err)
		}
	}
	if _, err := ReadFile(fsys, name, 2); err == nil {
		t.Error("read beyond the limit")
	}
}

// testRandom compares a file with a slice of bytes under random operations.
func testRandom(t *testing.T, make func() (FS, string)) {
	rapid.Check(t, func(t *rapid.T) {
		fsys, dir := make()
		f := must(fsys.Create(path.Join(dir, "f")))
		defer f.Close()
		var model []byte
		for range rapid.IntRange(1, 30).Draw(t, "ops") {
			off := rapid.IntRange(0, 20_000).Draw(t, "off")
			n := rapid.IntRange(1, 9000).Draw(t, "n")
			switch rapid.IntRange(0, 3).Draw(t, "op") {
			case 0, 1:
				p := bytes.Repeat([]byte{byte(n)}, n)
				must(f.WriteAt(p, int64(off)))
				model = append(model, make8(max(0, off+n-len(model)))...)
				copy(model[off:], p)
			case 2:
				if err := f.Truncate(int64(off)); err != nil {
					t.Fatal(err)
				}
				model = append(model, make8(max(0, off-len(model)))...)[:off:off]
			case 3:
				if off+n <= len(model) {
					clear(model[off : off+n])
					if err := PunchHole(f, int64(off), int64(n)); err != nil {
						t.Fatal(err)
					}
				}
			}
			got := make8(int(must(f.Size())))
			f.ReadAt(got, 0)
			if !bytes.Equal(got, model) {
				t.Fatalf("content differs: %d bytes, want %d", len(got), len(model))
			}
		}
	})
}

func TestSpace(t *testing.T) {
	if total, free := Space(OS(), t.TempDir()); runtime.GOOS == "linux" && (total <= 0 || free <= 0 || free > total) {
		t.Errorf("%d of %d bytes are free", free, total)
	}
	if total, free := Space(OS(), "/no/such/directory"); total != 0 || free != 0 {
		t.Errorf("of nowhere: %d %d", total, free)
	}
	if total, _ := Space(NewMem(), "/"); total != 0 {
		t.Errorf("in memory: %d", total)
	}
}
