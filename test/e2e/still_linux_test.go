package e2e

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/testenv"
	"farside/test/load"
)

const (
	crash       = farsidev1.Consistency_CONSISTENCY_CRASH
	filesystem  = farsidev1.Consistency_CONSISTENCY_FILESYSTEM
	application = farsidev1.Consistency_CONSISTENCY_APPLICATION
)

// point makes a point and fails the test if it is not as consistent as was asked.
func (f *far) point(name string, kind farsidev1.Consistency) *farsidev1.TagPoint {
	f.t.Helper()
	p := f.try(name, kind)
	if p.GetConsistency() != kind {
		f.t.Fatalf("point %q is %v: %s", name, p.GetConsistency(), p.GetDetail())
	}
	return p
}

func (f *far) try(name string, kind farsidev1.Consistency) *farsidev1.TagPoint {
	f.t.Helper()
	r, err := f.stage.Far.Client.TagPoint(f.t.Context(), &farsidev1.TagPointRequest{
		Machine: f.stage.Far.Machine, Name: name, Consistency: kind, TimeoutMs: 60_000,
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return r.GetTag()
}

// image writes the disk as it was at a position into a file.
func (f *far) image(at *farsidev1.Position) string {
	f.t.Helper()
	v := f.open(at, false)
	defer f.close(v)
	image := filepath.Join(f.scratch(), "point.img")
	f.fetch(v, image)
	return image
}

// clean says, without mounting anything, what a file system has left to repair; "" for
// nothing.
var clean = map[string]func(image string) (string, error){
	"ext4": func(image string) (string, error) {
		out, err := exec.Command("dumpe2fs", "-h", image).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("dumpe2fs: %w: %s", err, out)
		}
		if strings.Contains(string(out), "needs_recovery") {
			return "its journal is to be replayed", nil
		}
		return judged("e2fsck", "-fn", image)
	},
	// A freeze leaves a record in the log of an xfs on purpose, so that the next mount looks for
	// inodes that were deleted while open, and counts the free blocks anew. But nothing is missing without
	// the log: all files are what they are behind the recovery.
	"xfs": func(image string) (string, error) {
		before, err := files(image, "ro,norecovery,nouuid")
		if err != nil {
			return err.Error(), nil // damaged so far that it can't be read
		}
		after, err := files(image, "nouuid")
		if err != nil {
			return "", err
		}
		for name, is := range after {
			if before[name] != is {
				return fmt.Sprintf("%s is %q without the log, and %q with it", name, before[name], is), nil
			}
		}
		if len(before) != len(after) {
			return fmt.Sprintf("%d files without the log, %d with it", len(before), len(after)), nil
		}
		return "", nil
	},
	"btrfs": func(image string) (string, error) {
		out, err := exec.Command("btrfs", "inspect-internal", "dump-super", image).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("btrfs dump-super: %w: %s", err, out)
		}
		for line := range strings.Lines(string(out)) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == "log_root" && f[1] != "0" {
				return "its log is to be replayed", nil
			}
		}
		return judged("btrfs", "check", "--readonly", image)
	},
}

// files mounts an image with options and returns what each file in it is.
func files(image, options string) (all map[string]string, err error) {
	l, err := load.NewLoop(image, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	dir := image + ".mnt"
	unmount, err := l.Mount(dir, "-o", options)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	all = make(map[string]string)
	return all, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		is := fmt.Sprint(info.Mode(), " ", info.ModTime().UnixNano())
		if info.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			is += fmt.Sprintf(" %d bytes %x", len(b), sha256.Sum256(b))
		}
		all[strings.TrimPrefix(path, dir)] = is
		return nil
	})
}

// judged runs a check that repairs nothing.
func judged(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return "", err
	}
	if err != nil {
		return fmt.Sprintf("%s: %v: %s", name, err, out[max(0, len(out)-400):]), nil
	}
	return "", nil
}

// TestFileSystemPoints: at a file-system point there is nothing to replay and nothing
// to repair; at crash-consistent points in between there is.
func TestFileSystemPoints(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			testenv.NeedTool(t, "dumpe2fs")
			l := newLab(t, labOptions{fs: kind, size: 320 << 20})
			l.protect(l.loop.Device)
			l.exact(60 * time.Second)
			const rounds = 3
			var still, between []*farsidev1.TagPoint
			l.load(func() {
				for i := range rounds {
					time.Sleep(500 * time.Millisecond)
					between = append(between, l.point(fmt.Sprint("between ", i), crash))
					began := time.Now()
					still = append(still, l.point(fmt.Sprint("still ", i), filesystem))
					t.Logf("a point took %s", time.Since(began).Round(time.Millisecond))
				}
			})
			l.leave()
			for _, p := range still {
				if why, err := clean[kind](l.image(p.GetPosition())); err != nil || why != "" {
					t.Errorf("%s is not clean: %s %v", p.GetName(), why, err)
				}
			}
			dirty := 0
			for _, p := range between {
				if why, err := clean[kind](l.image(p.GetPosition())); err != nil || why != "" {
					dirty++
				}
			}
			t.Logf("%d of %d points in between were dirty", dirty, rounds)
			if dirty == 0 {
				t.Error("the points in between are clean as well: this shows nothing")
			}
			// The load's database is whole as well, at all of them.
			for _, p := range append(still, between...) {
				if err := l.judge(l.image(p.GetPosition()), p.GetTimeNs()); err != nil {
					t.Errorf("%s: %v", p.GetName(), err)
				}
			}
		})
	}
}

// TestPointWithoutFileSystem: a disk that nobody mounts has crash-consistent points, which say why.
func TestPointWithoutFileSystem(t *testing.T) {
	t.Parallel()
	l := newLab(t, labOptions{size: 64 << 20})
	l.leave()
	l.protect(l.loop.Device)
	l.exact(60 * time.Second)
	p := l.try("x", filesystem)
	if p.GetConsistency() != crash || !strings.Contains(p.GetDetail(), "no mounted file system") {
		t.Errorf("it is %v: %q", p.GetConsistency(), p.GetDetail())
	}
	p = l.try("y", application)
	if p.GetConsistency() != crash || p.GetDetail() == "" {
		t.Errorf("it is %v: %q", p.GetConsistency(), p.GetDetail())
	}
}
