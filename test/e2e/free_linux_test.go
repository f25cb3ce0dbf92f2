package e2e

import (
	"crypto/sha256"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/test/load"
)

// TestFreeBlocks: the first copy leaves out what the file system says is free, and so does the
// comparison of the agent that follows, of ext4. The load goes on. At every position the load's database is
// right, and in the end all files have the checksums that they have here, though the disk's
// free blocks, full of what was deleted, are not in the copy.
func TestFreeBlocks(t *testing.T) {
	t.Parallel()
	for name, size := range map[string]int64{"ext4": 192 << 20, "xfs": 320 << 20} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := kindle(t, labOptions{fs: name, size: size, settings: map[string]map[string]string{
				"agent": {"compare": "{skip_free: [ext4, xfs]}"},
			}}, seedOf(t))
			junk(f.lab)
			f.load(func() {
				f.protect(f.loop.Device)
				m := f.exact(time.Minute)
				spared(f, m)
				if name == "ext4" {
					f.kill("agent", func() { time.Sleep(time.Second) })
					f.until(time.Minute, "the new agent is exact", comparedSparingly)
				}
				time.Sleep(time.Second)
			})

			f.right(f.positions(rand.New(rand.NewPCG(3, 3)), 3, nil, judgeFiles(f)))
		})
	}
}

const junkSize = 96 << 20

// junk fills the file system and frees it again: what is free is not zero.
func junk(l *lab) {
	l.t.Helper()
	b := make([]byte, junkSize)
	for i := range b {
		b[i] = byte(i%251) + 1
	}
	file := filepath.Join(l.mount, "junk")
	f, err := os.Create(file)
	if err == nil {
		_, err = f.Write(b)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		l.t.Fatal(err)
	}
	f.Close()
	if err := os.Remove(file); err != nil {
		l.t.Fatal(err)
	}
}

// spared checks that somebody said what is free.
func spared(f *fire, m *farsidev1.Machine) {
	f.t.Helper()
	f.t.Logf("%d of %d bytes were sent", m.GetCounters().GetBytesSent(), f.size)
	if i := slices.IndexFunc(m.GetEvents(), isFree); i < 0 {
		f.t.Errorf("nothing says what is free: %v", m.GetEvents())
	} else {
		f.t.Log(m.GetEvents()[i].GetText())
	}
}

// junkIn counts the bytes of an image that are what junk wrote.
func junkIn(f *fire, image string) (n int64) {
	f.t.Helper()
	b, err := os.ReadFile(image)
	if err != nil {
		f.t.Fatal(err)
	}
	for block := range slices.Chunk(b, 4096) {
		ok := true
		for i := 1; i < len(block) && ok; i++ {
			ok = block[i] == block[i-1]%251+1
		}
		if ok {
			n += int64(len(block))
		}
	}
	return n
}

func isFree(e *farsidev1.Notice) bool { return e.GetCode() == "free-blocks" }

// comparedSparingly reports whether the second agent, whose events these are, has compared and is exact.
func comparedSparingly(m *farsidev1.Machine) bool {
	seen := map[string]bool{}
	for _, e := range m.GetEvents() {
		seen[e.GetCode()] = true
	}
	return seen["agent-restart"] && seen["free-blocks"] && seen["exact"]
}

// judgeFiles compares the files of the copy with those of the disk, at a moment at which that stands still.
func judgeFiles(f *fire) *farsidev1.Position {
	f.t.Helper()
	thaw, err := load.Freeze(f.mount)
	if err != nil {
		f.t.Fatal(err)
	}
	tag, err := f.stage.Far.Tag(f.t.Context(), "still")
	if err := thaw(); err != nil {
		f.t.Error(err)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	want, err := checksums(f.mount)
	if err != nil {
		f.t.Fatal(err)
	}
	v := f.open(tag.GetPosition(), false)
	image := filepath.Join(f.scratch(), "still.img")
	f.fetch(v, image)
	f.close(v)
	if n := junkIn(f, image); n > junkSize/10 {
		f.t.Errorf("the copy holds %d bytes of what was deleted before, of %d", n, junkSize)
	} else {
		f.t.Logf("the copy holds %d bytes of what was deleted before, the disk %d", n, junkIn(f, f.loop.File))
	}
	var got map[string][sha256.Size]byte
	dir := filepath.Join(f.dir, "copy")
	err = load.WithImage(f.fs, image, dir, func() (err error) {
		got, err = checksums(dir)
		return err
	})
	if err != nil {
		f.t.Fatal(err)
	}
	if len(got) == 0 || !maps.Equal(got, want) {
		f.t.Errorf("the copy has %d files, the disk %d, and they differ", len(got), len(want))
	}
	f.t.Logf("%d files are the same", len(got))
	return tag.GetPosition()
}

func checksums(dir string) (map[string][sha256.Size]byte, error) {
	sums := map[string][sha256.Size]byte{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		sums[strings.TrimPrefix(path, dir)] = sha256.Sum256(b)
		return err
	})
	return sums, err
}
