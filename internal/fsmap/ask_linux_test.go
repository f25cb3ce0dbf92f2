package fsmap

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farside/internal/blockdev"
	"farside/internal/dr"
	"farside/internal/testenv"
	"farside/test/load"
)

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// small makes a file system of 64 MiB that is mounted at the directory.
func small(t *testing.T, format ...string) (l *load.Loop, mount string) {
	t.Helper()
	testenv.NeedLoop(t)
	testenv.NeedTool(t, "mkfs.ext4", "mount", "umount")
	dir := t.TempDir()
	l, err := load.NewLoop(filepath.Join(dir, "disk"), 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	run(t, "mkfs.ext4", append(append([]string{"-q", "-F"}, format...), l.Device)...)
	mount = filepath.Join(dir, "mnt")
	unmount, err := l.Mount(mount)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unmount() })
	return l, mount
}

func takeOf(t *testing.T, l *load.Loop) (*Map, Volume) {
	t.Helper()
	f, err := os.Open(l.File)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	m := NewTaker().Take(ctx, Disk{Path: l.Device, Size: info.Size(), ReadAt: f.ReadAt}, Ext4, XFS)
	if len(m.Volumes) != 1 {
		t.Fatalf("volumes %+v", m.Volumes)
	}
	if v := m.Volumes[0]; v.Free != m.Free.Bytes() || v.Err != nil && v.Free != 0 {
		t.Fatalf("%d bytes free: %+v", m.Free.Bytes(), v)
	}
	return m, m.Volumes[0]
}

// TestMounts: who is asked is the file system of the device, however it is mounted, or nobody.
func TestMounts(t *testing.T) {
	t.Parallel()
	l, mount := small(t)
	whole, v := takeOf(t, l)
	if v.Mount != mount || v.Free < 32<<20 || v.Free > 64<<20 {
		t.Fatalf("plain: %+v", v)
	}
	t.Run("bind mount of a file", func(t *testing.T) {
		inner, file := filepath.Join(mount, "inner"), filepath.Join(t.TempDir(), "file")
		if err := errors.Join(os.WriteFile(inner, nil, 0o600), os.WriteFile(file, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		run(t, "mount", "--bind", inner, file)
		defer run(t, "umount", file)
		run(t, "umount", mount)
		defer run(t, "mount", l.Device, mount)
		m, v := takeOf(t, l)
		if v.Mount != file || m.Free.Bytes() < whole.Free.Bytes()-1<<20 {
			t.Errorf("%d bytes free: %+v", m.Free.Bytes(), v)
		}
	})
	t.Run("something mounted over it", func(t *testing.T) {
		run(t, "mount", "-t", "tmpfs", "none", mount)
		defer run(t, "umount", mount)
		if _, v := takeOf(t, l); !errors.Is(v.Err, dr.ErrNotFound) {
			t.Errorf("%+v", v)
		}
	})
	t.Run("read-only", func(t *testing.T) {
		run(t, "mount", "-o", "remount,ro", mount)
		defer run(t, "mount", "-o", "remount,rw", mount)
		if _, v := takeOf(t, l); !errors.Is(v.Err, dr.ErrUnsupported) || !strings.Contains(v.Err.Error(), "read-only") {
			t.Errorf("%+v", v)
		}
	})
	t.Run("not mounted", func(t *testing.T) {
		run(t, "umount", mount)
		defer run(t, "mount", l.Device, mount)
		if _, v := takeOf(t, l); !errors.Is(v.Err, dr.ErrNotFound) {
			t.Errorf("%+v", v)
		}
	})
	t.Run("frozen", func(t *testing.T) { // whatever it answers, it answers, and goes on
		thaw, err := load.Freeze(mount)
		if err != nil {
			t.Fatal(err)
		}
		_, v := takeOf(t, l)
		t.Logf("frozen: %d bytes free, %v", v.Free, v.Err)
		if err := thaw(); err != nil {
			t.Fatal(err)
		}
	})
	if _, v := takeOf(t, l); v.Err != nil || v.Mount != mount {
		t.Errorf("in the end: %+v", v)
	}
}

// TestFormats: layouts of ext4 that are asked, and such that are not. None of what is said to be free is
// in use for dumpe2fs.
func TestFormats(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		args []string
		ok   bool
	}{
		"usual":        {nil, true},
		"1 KiB blocks": {[]string{"-b", "1024"}, true},
		"no flex_bg":   {[]string{"-O", "^flex_bg,^resize_inode", "-b", "1024"}, true},
		"meta_bg":      {[]string{"-O", "meta_bg,^resize_inode", "-b", "1024"}, true},
		"bigalloc":     {[]string{"-O", "bigalloc"}, false},
		"fast commits": {[]string{"-O", "fast_commit"}, false},
		"no journal":   {[]string{"-O", "^has_journal"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testenv.NeedTool(t, "dumpe2fs")
			l, mount := small(t, c.args...)
			m, v := takeOf(t, l)
			if (v.Err == nil) != c.ok || v.Err != nil && !errors.Is(v.Err, dr.ErrUnsupported) {
				t.Fatalf("%+v", v)
			}
			run(t, "umount", mount)
			defer run(t, "mount", l.Device, mount)
			free, block := freeOf(t, run(t, "dumpe2fs", l.Device))
			for r := range m.Free.All() {
				for at := r.Start / block; at < r.End/block; at++ {
					if !free[at] {
						t.Fatalf("block %d is in use, and free are %v", at, r)
					}
				}
			}
			t.Logf("%d of %d free bytes are told", m.Free.Bytes(), int64(len(free))*block)
		})
	}
}

// freeOf reads which blocks are free from what dumpe2fs prints, and how large a block is.
func freeOf(t *testing.T, text string) (free map[int64]bool, block int64) {
	t.Helper()
	free = make(map[int64]bool)
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, "Block size:"); ok {
			block = number(t, v)
		}
		v, ok := strings.CutPrefix(line, "  Free blocks:")
		if !ok || strings.TrimSpace(v) == "" {
			continue
		}
		for part := range strings.SplitSeq(strings.TrimSpace(v), ",") {
			from, to, ranged := strings.Cut(part, "-")
			if !ranged {
				to = from
			}
			for at := number(t, from); at <= number(t, to); at++ {
				free[at] = true
			}
		}
	}
	return free, block
}

func number(t *testing.T, s string) (n int64) {
	t.Helper()
	for _, c := range strings.TrimSpace(s) {
		if c < '0' || c > '9' {
			t.Fatalf("%q is no number", s)
		}
		n = n*10 + int64(c-'0')
	}
	return n
}

// TestPartition: what a partition says is free lies behind its beginning.
func TestPartition(t *testing.T) {
	t.Parallel()
	l, _ := small(t)
	root := os.DirFS("/")
	f, err := os.Open(l.File)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const start = 1 << 20
	tk := NewTaker()
	tk.scan = func() blockdev.Machine { // the loop device is what the kernel would call a partition of another
		m := blockdev.Scan(root)
		part, _ := m.Find(l.Device)
		part.Whole, part.Start = "sdx", start
		m.Devices = append(m.Devices[:0], blockdev.Device{Name: "sdx", Path: "/dev/sdx"}, part)
		return m
	}
	plain, _ := takeOf(t, l)
	m := tk.Take(t.Context(), Disk{Path: "/dev/sdx", Size: 80 << 20, ReadAt: func(b []byte, off int64) (int, error) {
		return f.ReadAt(b, off-start)
	}}, Ext4)
	if m.Free.Bytes() != plain.Free.Bytes() || m.Free.Bytes() == 0 {
		t.Fatalf("%d bytes are free, %d without an offset: %+v", m.Free.Bytes(), plain.Free.Bytes(), m.Volumes)
	}
	for r := range plain.Free.All() {
		if !m.Free.Contains(r.Start+start, r.End+start) {
			t.Errorf("%v is not free at its place", r)
		}
	}
}
