package quiesce

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"farside/internal/dr"
)

// recorded is a machine as its proc and sys say.
type recorded struct {
	files fstest.MapFS
	nodes map[string]string // "major:minor" by path
	loops map[string]loopBacking
}

func (r *recorded) system() *system {
	return &system{
		root: r.files,
		devno: func(path string) (string, error) {
			dev, ok := r.nodes[path]
			if !ok {
				return "", fmt.Errorf("no %s: %w", path, dr.ErrNotFound)
			}
			return dev, nil
		},
		loop: func(dev string) (loopBacking, error) {
			b, ok := r.loops[dev]
			if !ok {
				return b, fs.ErrNotExist
			}
			return b, nil
		},
	}
}

func newRecorded(mountinfo ...string) *recorded {
	r := &recorded{files: fstest.MapFS{}, nodes: map[string]string{}, loops: map[string]loopBacking{}}
	r.file("proc/self/mountinfo", strings.Join(mountinfo, "\n")+"\n")
	r.link("proc/self/ns/mnt", "mnt:[1]")
	return r
}

func (r *recorded) file(name, text string) { r.files[name] = &fstest.MapFile{Data: []byte(text)} }

func (r *recorded) link(name, to string) {
	r.files[name] = &fstest.MapFile{Data: []byte(to), Mode: fs.ModeSymlink | 0o777}
}

// disk adds a disk and its partitions, each as name=major:minor.
func (r *recorded) disk(all ...string) {
	disk, dev, _ := strings.Cut(all[0], "=")
	r.file("sys/block/"+disk+"/dev", dev+"\n")
	r.nodes["/dev/"+disk] = dev
	for i, p := range all[1:] {
		name, dev, _ := strings.Cut(p, "=")
		r.file("sys/block/"+disk+"/"+name+"/dev", dev+"\n")
		r.file("sys/block/"+disk+"/"+name+"/partition", fmt.Sprintln(i+1))
		r.nodes["/dev/"+name] = dev
	}
}

// stacked adds a device that is made of others.
func (r *recorded) stacked(name, dev string, slaves ...string) {
	r.disk(name + "=" + dev)
	for _, s := range slaves {
		r.file("sys/block/"+name+"/slaves/"+s+"/dev", r.nodes["/dev/"+s]+"\n")
	}
}

// places shows file systems in order: mount point, and the depth if there is one.
func places(all []FileSystem) string {
	var out []string
	for _, f := range all {
		text := f.Mount
		if f.depth > 0 {
			text += fmt.Sprint("+", f.depth)
		}
		out = append(out, text)
	}
	return strings.Join(out, " ")
}

const (
	rootLine = `22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro`
	procLine = `23 22 0:21 / /proc rw,nosuid - proc proc rw`
)

func TestFind(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		setup func() *recorded
		disks []string
		want  string
	}{
		{"a partition of the disk", func() *recorded {
			r := newRecorded(rootLine, procLine, `24 22 8:17 / /srv rw - xfs /dev/sdb1 rw`)
			r.disk("sda=8:0", "sda1=8:1")
			r.disk("sdb=8:16", "sdb1=8:17")
			return r
		}, []string{"/dev/sda"}, "/"},
		{"the partition itself", func() *recorded {
			r := newRecorded(rootLine, `24 22 8:2 / /srv rw - xfs /dev/sda2 rw`)
			r.disk("sda=8:0", "sda1=8:1", "sda2=8:2")
			return r
		}, []string{"/dev/sda2"}, "/srv"},
		{"bind mounts once, the whole one first, read-only ones of a writable file system too", func() *recorded {
			r := newRecorded(
				`30 22 8:1 /var/lib/x /x rw - ext4 /dev/sda1 rw`, rootLine, `31 22 8:1 / /ro ro,relatime - ext4 /dev/sda1 rw`)
			r.disk("sda=8:0", "sda1=8:1")
			return r
		}, []string{"/dev/sda"}, "/"},
		{"not what is mounted read-only", func() *recorded {
			r := newRecorded(`22 1 8:1 / / rw - ext4 /dev/sda1 ro`, `24 22 8:2 / /srv rw - ext4 /dev/sda2 rw`)
			r.disk("sda=8:0", "sda1=8:1", "sda2=8:2")
			return r
		}, []string{"/dev/sda"}, "/srv"},
		{"through LVM over dm-crypt over two disks", func() *recorded {
			r := newRecorded(rootLine, `24 22 253:1 / /data rw - xfs /dev/mapper/vg-data rw`)
			r.disk("sda=8:0", "sda1=8:1")
			r.disk("sdb=8:16")
			r.disk("sdc=8:32", "sdc1=8:33")
			r.stacked("dm-0", "253:0", "sdc1")
			r.stacked("dm-1", "253:1", "sdb", "dm-0")
			return r
		}, []string{"/dev/sdc"}, "/data"},
		{"btrfs on its second device", func() *recorded {
			r := newRecorded(rootLine, `24 22 0:45 /sub /data rw - btrfs /dev/sdb rw,subvolid=256`)
			r.disk("sda=8:0", "sda1=8:1")
			r.disk("sdb=8:16")
			r.disk("sdc=8:32")
			r.file("sys/fs/btrfs/features/x", "1")
			r.file("sys/fs/btrfs/uuid/devices/sdb/dev", "8:16")
			r.file("sys/fs/btrfs/uuid/devices/sdc/dev", "8:32")
			return r
		}, []string{"/dev/sdc"}, "/data"},
		{"a file system on a file goes before its host", func() *recorded {
			r := newRecorded(rootLine, `24 22 7:0 / /a rw - ext4 /dev/loop0 rw`, `25 22 7:1 / /b rw - ext4 /dev/loop1 rw`)
			r.disk("sda=8:0", "sda1=8:1")
			r.disk("loop0=7:0")
			r.disk("loop1=7:1")
			r.loops["7:0"] = loopBacking{superblock: "8:1"}
			r.loops["7:1"] = loopBacking{superblock: "7:0"}
			return r
		}, []string{"/dev/sda"}, "/b+2 /a+1 /"},
		{"a captured loop device does not capture its host", func() *recorded {
			r := newRecorded(rootLine, `24 22 259:0 / /a rw - ext4 /dev/loop0p1 rw`)
			r.disk("sda=8:0", "sda1=8:1")
			r.disk("loop0=7:0", "loop0p1=259:0")
			r.loops["7:0"] = loopBacking{superblock: "8:1"}
			return r
		}, []string{"/dev/loop0"}, "/a+1"},
		{"a loop device on a disk", func() *recorded {
			r := newRecorded(`24 22 7:0 / /a rw - ext4 /dev/loop0 rw`)
			r.disk("sda=8:0")
			r.disk("loop0=7:0")
			r.loops["7:0"] = loopBacking{device: "8:0"}
			return r
		}, []string{"/dev/sda"}, "/a"},
		{"what only a container has mounted", func() *recorded {
			r := newRecorded(rootLine)
			r.disk("sda=8:0", "sda1=8:1", "sda2=8:2")
			r.link("proc/77/ns/mnt", "mnt:[2]")
			r.file("proc/77/mountinfo", "90 89 8:2 / /var\\040lib rw - ext4 /dev/sda2 rw\n91 89 8:1 / /host rw - ext4 /dev/sda1 rw\n")
			r.link("proc/78/ns/mnt", "mnt:[1]")
			r.file("proc/78/mountinfo", "90 89 8:3 / /never rw - ext4 /dev/sda3 rw\n")
			return r
		}, []string{"/dev/sda"}, "/ /proc/77/root/var lib"},
		{"a file behind the tap", func() *recorded {
			r := newRecorded(rootLine)
			r.disk("sda=8:0", "sda1=8:1")
			r.nodes["/srv/disk.img"] = ""
			return r
		}, []string{"/srv/disk.img"}, ""},
		{"no sysfs", func() *recorded {
			r := newRecorded(rootLine)
			r.nodes["/dev/sda1"] = "8:1"
			return r
		}, []string{"/dev/sda1"}, "/"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			got, err := tc.setup().system().find(tc.disks)
			if err != nil || places(got) != tc.want {
				t.Errorf("found %q, %v, want %q", places(got), err, tc.want)
			}
		})
	}
}

func TestFindRefuses(t *testing.T) {
	t.Parallel()
	r := newRecorded(rootLine)
	r.disk("sda=8:0", "sda1=8:1")
	if _, err := r.system().find([]string{"/dev/sdz"}); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("a disk that is not there: %v", err)
	}
	ring := newRecorded(`24 22 7:0 / /a rw - ext4 /dev/loop0 rw`)
	ring.disk("loop0=7:0")
	ring.loops["7:0"] = loopBacking{superblock: "7:0"}
	if _, err := ring.system().find([]string{"/dev/loop0"}); !errors.Is(err, errDeep) {
		t.Errorf("a ring: %v", err)
	}
	blind := newRecorded(`24 22 7:0 / /a rw - ext4 /dev/loop0 rw`)
	blind.disk("loop0=7:0")
	blind.loops["7:0"] = loopBacking{}
	if _, err := blind.system().find([]string{"/dev/loop0"}); !errors.Is(err, dr.ErrUnsupported) {
		t.Errorf("a loop device of which nothing is known: %v", err)
	}
}

// TestFindPrefersWholeMounts: the mount by which a file system is opened is one of
// the whole of it, in our own namespace, if there is one.
func TestFindPrefersWholeMounts(t *testing.T) {
	t.Parallel()
	r := newRecorded(`30 22 8:1 /x /a rw - ext4 /dev/sda1 rw`, rootLine, `31 22 8:1 / /b rw - ext4 /dev/sda1 rw`)
	r.disk("sda=8:0", "sda1=8:1")
	got, err := r.system().find([]string{"/dev/sda"})
	if err != nil || len(got) != 1 {
		t.Fatal(got, err)
	}
	var order []string
	for _, m := range got[0].mounts {
		order = append(order, m.path)
	}
	if !slices.Equal(order, []string{"/", "/b", "/a"}) {
		t.Errorf("opened in the order %v", order)
	}
}

func FuzzParseMountinfo(f *testing.F) {
	f.Add(rootLine + "\n" + procLine)
	f.Add(`22 1 8:1 / /a\040b rw - ext4`)
	f.Add("- - - - - - - - - -")
	f.Fuzz(func(t *testing.T, text string) {
		for _, m := range parseMountinfo(text, "/proc/1/root") {
			if m.id == "" || m.dev == "" || !strings.HasPrefix(m.path, "/proc/1/root") && !strings.Contains(m.path, "..") && !strings.HasPrefix(m.path, "/") {
				t.Errorf("%q makes %+v", text, m)
			}
		}
	})
}

func FuzzParseRecord(f *testing.F) {
	f.Add(record{what: recArm, after: 10_000_000_000}.bytes())
	f.Add(record{what: recFreezing, index: 65535}.bytes())
	f.Add([]byte("nonsense"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRecord(b)
		if err != nil {
			if !errors.Is(err, dr.ErrInvalid) {
				t.Errorf("error without kind: %v", err)
			}
			return
		}
		if again, err := parseRecord(r.bytes()); err != nil || again != r {
			t.Errorf("%x is %+v, then %+v, %v", b, r, again, err)
		}
	})
}
