package e2e

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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

// point makes a point and fails the test if it is not as consistent as was asked. That
// a machine with much else to do can't keep up is no failure: it is asked again.
func (f *far) point(name string, kind farsidev1.Consistency) *farsidev1.TagPoint {
	f.t.Helper()
	p := f.try(name, kind)
	for try := 0; try < 3 && strings.Contains(p.GetDetail(), "calm stream"); try++ {
		f.t.Logf("again, since %s", p.GetDetail())
		p = f.try(name, kind)
	}
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
			t.Logf("%s was frozen for %s", kind, strings.Join(l.frozenFor(), ", "))
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

// frozenFor returns how long file systems were frozen for points, as the agent says.
func (l *lab) frozenFor() (all []string) {
	l.t.Helper()
	text, err := os.ReadFile(filepath.Join(l.dir, "agent.log"))
	if err != nil {
		l.t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`msg="made a point".* for=([^ ]+)`).FindAllStringSubmatch(string(text), -1) {
		all = append(all, m[1])
	}
	return all
}

// TestAgentKilledAtPoint: an agent that is killed while a hook runs leaves nothing behind: the next one
// undoes what was prepared, and makes the point that is still wanted.
func TestAgentKilledAtPoint(t *testing.T) {
	testenv.NeedRoot(t)
	t.Parallel()
	dir := t.TempDir()
	told := filepath.Join(dir, "told")
	for phase, script := range map[string]string{
		"pre-freeze": "echo pre >> " + told + "; [ -e " + told + ".slow ] && sleep 10",
		"post-thaw":  `echo "post $FARSIDE_RESULT" >> ` + told,
	} {
		d := filepath.Join(dir, phase+".d")
		err := errors.Join(os.Mkdir(d, 0o755), os.WriteFile(filepath.Join(d, "x"), []byte("#!/bin/sh\n"+script+"\ntrue\n"), 0o755))
		if err != nil {
			t.Fatal(err)
		}
	}
	l := newLab(t, labOptions{size: 64 << 20, settings: map[string]map[string]string{
		"agent": {"points": fmt.Sprintf("{hooks: %q, run: %q}", dir, dir+"/run")},
	}})
	l.protect(l.loop.Device)
	l.exact(60 * time.Second)
	if err := os.WriteFile(told+".slow", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	reached := make(chan *farsidev1.TagPoint, 1)
	go func() {
		r, err := l.stage.Far.Client.TagPoint(t.Context(), &farsidev1.TagPointRequest{
			Machine: l.stage.Far.Machine, Name: "cut off", Consistency: application, TimeoutMs: 60_000,
		})
		if err != nil {
			t.Error(err)
		}
		reached <- r.GetTag()
	}()
	said := func() string {
		text, err := os.ReadFile(told)
		if err != nil {
			return ""
		}
		return string(text)
	}
	waitFor(t, "the hook", func() bool { return said() == "pre\n" })
	if err := errors.Join(l.stage.Halt("agent", true), os.Remove(told+".slow")); err != nil {
		t.Fatal(err)
	}
	if err := l.stage.Again("agent"); err != nil {
		t.Fatal(err)
	}
	if p := <-reached; p.GetConsistency() != application {
		t.Errorf("the point is %v: %s", p.GetConsistency(), p.GetDetail())
	}
	waitFor(t, "the hooks of the second attempt", func() bool { return said() == "pre\npost failed\npre\npost ok\n" })
	waitFor(t, "an empty directory of runs", func() bool {
		left, err := filepath.Glob(dir + "/run/*/*")
		return err == nil && len(left) == 0
	})
}

// waitFor waits until something is so.
func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
