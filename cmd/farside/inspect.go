package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
	"farside/internal/vfs"
)

// inspected is what inspect says of a file.
type inspected struct {
	File   string      `json:"file"`
	Format string      `json:"format"` // "frames" or "segment"
	Sealed *bool       `json:"sealed,omitempty"`
	Torn   int64       `json:"torn_bytes,omitempty"` // behind the last whole frame of a segment
	Frames []frameInfo `json:"frames"`
	Error  string      `json:"error,omitempty"` // the first fault, if any
}

// frameInfo is one frame; offsets and lengths in bytes.
type frameInfo struct {
	Offset    int64        `json:"offset"`
	Length    int64        `json:"length"`
	Kind      string       `json:"kind"`
	Accuracy  string       `json:"accuracy"`
	Open      bool         `json:"open,omitempty"`
	Folded    bool         `json:"folded,omitempty"`
	Machine   dr.MachineID `json:"machine"`
	Timeline  dr.Timeline  `json:"timeline"`
	First     dr.Seq       `json:"first"`
	Last      dr.Seq       `json:"last"`
	FirstTime time.Time    `json:"first_time"`
	LastTime  time.Time    `json:"last_time"`
	Codec     string       `json:"codec"`
	RawLen    int          `json:"raw_bytes"`
	StoredLen int          `json:"stored_bytes"`
	Extents   int          `json:"extents"`
	Chain     string       `json:"chain"`
	Tag       *tagInfo     `json:"tag,omitempty"`
	List      []extentInfo `json:"list,omitempty"`
	// Checked: "whole" (checksums), "proven" (checksums, continuity and hash chain), or what is wrong.
	Checked string `json:"checked"`
}

type tagInfo struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	Consistency string `json:"consistency"`
}

type extentInfo struct {
	Disk   dr.DiskID `json:"disk"`
	Offset int64     `json:"offset"`
	Length int64     `json:"length"`
	What   string    `json:"what"`
	Seq    dr.Seq    `json:"seq"`
	Time   time.Time `json:"time"`
}

func newInspect(a *app) *cobra.Command {
	var extents bool
	cmd := &cobra.Command{
		Use:   "inspect FILE",
		Short: "Say what a file of frames or a segment holds, and verify it",
		Long: `Inspect reads a segment, or a file of frames back to back, and prints each frame:
positions, times, sizes, tags. It verifies checksums, continuity and the hash chain;
the exit code is 5 if something is wrong with them.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			info, err := inspectFile(cmd.Context(), args[0], extents)
			if info == nil {
				return err
			}
			if err != nil {
				info.Error = err.Error()
			}
			return errors.Join(a.print(info, info.human), err)
		},
	}
	cmd.Flags().BoolVar(&extents, "extents", false, "list every extent too")
	return cmd
}

// inspectFile returns as much as could be read, and the first fault.
func inspectFile(ctx context.Context, path string, extents bool) (*inspected, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("inspect: %w", err)
	}
	defer f.Close()
	var magic [4]byte
	if _, err := f.ReadAt(magic[:], 0); err != nil {
		return nil, fmt.Errorf("inspect %s: too short for any format of farside: %w", path, dr.ErrCorrupt)
	}
	switch string(magic[:]) {
	case "FSFR":
		info := &inspected{File: path, Format: "frames"}
		return info, info.readFrames(f, extents)
	case "FSSG":
		info := &inspected{File: path, Format: "segment"}
		return info, info.readSegment(ctx, extents)
	}
	return nil, fmt.Errorf("inspect %s: magic %q is of no format of farside: %w", path, magic[:], dr.ErrCorrupt)
}

// readSegment reads the frames of a segment and then has the segment prove itself.
func (in *inspected) readSegment(ctx context.Context, extents bool) error {
	r, err := segment.Open(vfs.OS(), filepath.Dir(in.File), filepath.Base(in.File))
	if err != nil {
		return fmt.Errorf("inspect: %w", err)
	}
	defer r.Close()
	sealed := r.Sealed()
	in.Sealed, in.Torn = &sealed, r.Torn()
	v := verifier{cursor: r.Start(), known: true}
	var first error
	for _, e := range r.Entries() {
		f, err := r.Frame(e.Off)
		if err != nil {
			return cmp.Or(first, fmt.Errorf("inspect: %w", err))
		}
		first = cmp.Or(first, in.add(e.Off, f, &v, extents))
	}
	if first != nil {
		return first
	}
	if err := r.Check(ctx); err != nil {
		return fmt.Errorf("inspect: %w", err)
	}
	return nil
}

// readFrames reads frames back to back until the end of f or the first frame whose end is not known.
func (in *inspected) readFrames(f io.ReaderAt, extents bool) error {
	var v verifier
	var first error
	for off := int64(0); ; {
		parsed, err := readFrame(f, off)
		if errors.Is(err, io.EOF) {
			return first
		}
		if err != nil {
			return cmp.Or(first, fmt.Errorf("frame at %d: %w", off, err))
		}
		first = cmp.Or(first, in.add(off, parsed, &v, extents))
		off += parsed.Size()
	}
}

// readFrame reads the frame at off; io.EOF where the file ends before it.
func readFrame(f io.ReaderAt, off int64) (*frame.Frame, error) {
	head := make([]byte, frame.HeaderSize)
	n, err := f.ReadAt(head, off)
	if n == 0 && errors.Is(err, io.EOF) {
		return nil, io.EOF
	}
	if n < len(head) {
		return nil, fmt.Errorf("cut off in its header: %w", dr.ErrCorrupt)
	}
	h, err := frame.ParseHeader(head)
	if err != nil {
		return nil, err
	}
	b := make([]byte, h.Size())
	if n, _ := f.ReadAt(b, off); n < len(b) {
		return nil, fmt.Errorf("cut off: %d of %d bytes: %w", n, len(b), dr.ErrCorrupt)
	}
	return frame.Parse(b)
}

// add describes and verifies one frame.
func (in *inspected) add(off int64, f *frame.Frame, v *verifier, extents bool) error {
	info := describe(off, f, extents)
	proven, err := v.verify(f)
	switch {
	case err != nil:
		info.Checked = err.Error()
		err = fmt.Errorf("frame at %d: %w", off, err)
	case proven:
		info.Checked = "proven"
	default:
		info.Checked = "whole"
	}
	in.Frames = append(in.Frames, info)
	return err
}

// verifier checks each frame against the one before.
type verifier struct {
	cursor frame.Cursor
	known  bool // cursor is that of the frame before, or the beginning of everything
}

// verify checks payload, continuity and chain; proven says that the chain could be recomputed.
func (v *verifier) verify(f *frame.Frame) (proven bool, err error) {
	prev, known := v.cursor, v.known
	v.cursor, v.known = f.End(), true
	if err := f.Verify(); err != nil {
		return false, err
	}
	if known {
		if err := f.Check(prev); err != nil {
			return false, err
		}
	}
	if f.Folded || !known && f.Prev != 0 {
		return false, nil
	}
	if err := f.VerifyChain(prev.Chain); err != nil {
		return false, err
	}
	return true, nil
}

func describe(off int64, f *frame.Frame, extents bool) frameInfo {
	info := frameInfo{
		Offset: off, Length: f.Size(), Kind: f.Kind.String(), Accuracy: f.Accuracy.String(),
		Open: f.Open, Folded: f.Folded, Machine: f.Machine, Timeline: f.Timeline,
		First: f.First, Last: f.Last, FirstTime: utc(f.FirstTime), LastTime: utc(f.LastTime),
		Codec: f.Codec.String(), RawLen: f.RawLen, StoredLen: f.StoredLen, Extents: f.Header.Extents,
		Chain: hex.EncodeToString(f.Chain[:]),
	}
	if f.Kind == frame.TagKind {
		if t, err := f.Tag(); err == nil {
			info.Tag = &tagInfo{ID: hex.EncodeToString(t.ID[:]), Name: t.Name, Consistency: t.Consistency.String()}
		}
	}
	if extents {
		for _, e := range f.All() {
			info.List = append(info.List, extentInfo{
				Disk: e.Disk, Offset: e.Offset, Length: e.Length, What: e.What.String(), Seq: e.Seq, Time: utc(e.Time),
			})
		}
	}
	return info
}

func utc(ns int64) time.Time { return time.Unix(0, ns).UTC() }

// human writes the frames as a table, extents and tags below their frame.
func (in *inspected) human(w io.Writer) {
	fmt.Fprintf(w, "%s: %s, %d frames", in.File, in.Format, len(in.Frames))
	if in.Sealed != nil {
		fmt.Fprintf(w, ", %s", map[bool]string{true: "sealed", false: "not sealed"}[*in.Sealed])
	}
	if in.Torn > 0 {
		fmt.Fprintf(w, ", %d bytes of no use at the end", in.Torn)
	}
	fmt.Fprintln(w)
	if len(in.Frames) > 0 {
		fmt.Fprintf(w, "machine %v, timeline %d\n", in.Frames[0].Machine, in.Frames[0].Timeline)
	}
	for _, f := range in.Frames {
		fmt.Fprintf(w, "%10d  %-9s %-5s %d..%d  %s  %d extents, %d bytes in %d (%s)  %s\n",
			f.Offset, f.Kind, f.Accuracy, f.First, f.Last, f.LastTime.Format(time.RFC3339Nano),
			f.Extents, f.RawLen, f.StoredLen, f.Codec, f.marks()+f.Checked)
		if f.Tag != nil {
			fmt.Fprintf(w, "            tag %q, %s\n", f.Tag.Name, f.Tag.Consistency)
		}
		for _, e := range f.List {
			fmt.Fprintf(w, "            %d  disk %d  %d+%d  %s  %s\n",
				e.Seq, e.Disk, e.Offset, e.Length, e.What, e.Time.Format(time.RFC3339Nano))
		}
	}
}

// marks names the flags that are set.
func (f *frameInfo) marks() string {
	s := ""
	if f.Open {
		s += "open, "
	}
	if f.Folded {
		s += "folded, "
	}
	return s
}
