package segment

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"farside/internal/frame"
	"farside/internal/vfs"
)

// One round is a segment of 32 MiB, written in groups that are synced. The
// frames are made beforehand; the raw file gets the same bytes in the same pieces.
const benchRound = 32 << 20

var benchShapes = []struct{ frame, group int }{{4 << 10, 64}, {64 << 10, 16}, {1 << 20, 8}}

func benchFrames(b *testing.B, size int) (frames []*frame.Frame) {
	b.Helper()
	c := origin
	for range benchRound / size {
		f := bigFrame(b, c, size, 1)
		frames, c = append(frames, f), f.End()
	}
	return frames
}

func BenchmarkAppendSync(b *testing.B) {
	for _, x := range benchShapes {
		frames := benchFrames(b, x.frame)
		b.Run(fmt.Sprintf("segment/%dKiB*%d", x.frame>>10, x.group), func(b *testing.B) {
			b.SetBytes(benchRound)
			b.ReportAllocs()
			for b.Loop() {
				benchSegment(b, frames, x.group)
			}
		})
		b.Run(fmt.Sprintf("raw/%dKiB*%d", x.frame>>10, x.group), func(b *testing.B) {
			b.SetBytes(benchRound)
			for b.Loop() {
				benchRaw(b, frames, x.group)
			}
		})
	}
}

func benchSegment(b *testing.B, frames []*frame.Frame, group int) {
	dir := b.TempDir()
	w := must(Create(vfs.OS(), dir, origin))
	for i, f := range frames {
		must(w.Append(f))
		if (i+1)%group == 0 {
			if err := w.Sync(); err != nil {
				b.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	os.RemoveAll(dir)
}

func benchRaw(b *testing.B, frames []*frame.Frame, group int) {
	dir := b.TempDir()
	f := must(os.Create(filepath.Join(dir, "raw")))
	off := int64(0)
	for i, fr := range frames {
		off += int64(must(f.WriteAt(fr.Bytes(), off)))
		if (i+1)%group == 0 {
			if err := f.Sync(); err != nil {
				b.Fatal(err)
			}
		}
	}
	if err := f.Close(); err != nil {
		b.Fatal(err)
	}
	os.RemoveAll(dir)
}
