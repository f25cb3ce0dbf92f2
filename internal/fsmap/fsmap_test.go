package fsmap

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"farside/internal/blockdev"
	"farside/internal/dr"
	"farside/internal/extent"
)

func TestParseKind(t *testing.T) {
	for _, s := range []string{"ext4", "xfs"} {
		if k, err := ParseKind(s); err != nil || string(k) != s {
			t.Errorf("%s: %q, %v", s, k, err)
		}
	}
	for _, s := range []string{"", "EXT4", "btrfs"} {
		if _, err := ParseKind(s); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func device(path, whole string, start, size int64, mounts ...string) blockdev.Device {
	d := blockdev.Device{Path: path, Name: strings.TrimPrefix(path, "/dev/"), Whole: whole, Mounts: mounts}
	d.Start, d.Size, d.Dev = start, size, "8:"+path[len(path)-1:]
	return d
}

// TestVolumes: which places of a disk may be asked, and why the others may not.
func TestVolumes(t *testing.T) {
	const disk = 100 << 20
	change := func(d blockdev.Device, f func(*blockdev.Device)) blockdev.Device { f(&d); return d }
	whole := device("/dev/sda", "", 0, disk)
	one := device("/dev/sda1", "sda", 1<<20, 50<<20, "/")
	for name, c := range map[string]struct {
		path    string
		devices []blockdev.Device
		want    string
	}{
		"unknown":            {"/dev/sdb", []blockdev.Device{whole, one}, ""},
		"partition":          {"/dev/sda", []blockdev.Device{whole, one}, "/dev/sda1 at 1048576"},
		"of a partition":     {"/dev/sda1", []blockdev.Device{whole, one}, "/dev/sda1 at 0"},
		"whole":              {"/dev/sda", []blockdev.Device{device("/dev/sda", "", 0, disk, "/srv", "/bind")}, "/dev/sda at 0"},
		"not mounted":        {"/dev/sda", []blockdev.Device{whole}, "/dev/sda: unfit"},
		"another disk's":     {"/dev/sda", []blockdev.Device{whole, device("/dev/sdb1", "sdb", 0, 1<<20, "/")}, "/dev/sda: unfit"},
		"below LVM":          {"/dev/sda", []blockdev.Device{whole, change(one, func(d *blockdev.Device) { d.Holders = []string{"dm-0"} })}, "/dev/sda1: unfit"},
		"on something":       {"/dev/sda", []blockdev.Device{change(whole, func(d *blockdev.Device) { d.Slaves, d.Mounts = []string{"x"}, []string{"/"} })}, "/dev/sda: unfit"},
		"swap":               {"/dev/sda", []blockdev.Device{whole, change(one, func(d *blockdev.Device) { d.Swap = true })}, "/dev/sda1: unfit"},
		"beyond the end":     {"/dev/sda", []blockdev.Device{whole, device("/dev/sda1", "sda", 60<<20, 50<<20, "/")}, "/dev/sda1: unfit"},
		"far beyond the end": {"/dev/sda", []blockdev.Device{whole, device("/dev/sda1", "sda", 1<<62, 1<<62, "/")}, "/dev/sda1: unfit"},
		"overlapping":        {"/dev/sda", []blockdev.Device{whole, one, device("/dev/sda2", "sda", 40<<20, 50<<20, "/x")}, "/dev/sda1: unfit, /dev/sda2: unfit"},
		"disk and partition": {"/dev/sda", []blockdev.Device{device("/dev/sda", "", 0, disk, "/y"), one}, "/dev/sda: unfit, /dev/sda1: unfit"},
		"two":                {"/dev/sda", []blockdev.Device{whole, one, device("/dev/sda2", "sda", 60<<20, 20<<20, "/x")}, "/dev/sda1 at 1048576, /dev/sda2 at 62914560"},
	} {
		var got []string
		for _, v := range volumesOf(&blockdev.Machine{Devices: c.devices}, Disk{Path: c.path, Size: disk}) {
			if v.Err != nil {
				got = append(got, v.Device+": unfit")
			} else {
				got = append(got, fmt.Sprintf("%s at %d", v.Device, v.start))
			}
		}
		if s := strings.Join(got, ", "); s != c.want {
			t.Errorf("%s: %q, want %q", name, s, c.want)
		}
	}
}

func ext4Head(change func(b []byte)) []byte {
	b := make([]byte, superblockEnd)
	binary.LittleEndian.PutUint16(b[ext4MagicAt:], ext4Magic)
	binary.LittleEndian.PutUint32(b[ext4CompatAt:], hasJournal)
	if change != nil {
		change(b)
	}
	return b
}

func xfsHead(version uint16) []byte {
	b := make([]byte, superblockEnd)
	copy(b, xfsMagic)
	binary.BigEndian.PutUint16(b[xfsVersionAt:], version)
	return b
}

func TestJudge(t *testing.T) {
	for name, c := range map[string]struct {
		head []byte
		kind Kind
		ok   bool
	}{
		"ext4":         {ext4Head(nil), Ext4, true},
		"no journal":   {ext4Head(func(b []byte) { b[ext4CompatAt] = 0 }), Ext4, false},
		"fast commits": {ext4Head(func(b []byte) { b[ext4CompatAt+1] = 4 }), Ext4, false},
		"bigalloc":     {ext4Head(func(b []byte) { b[ext4ROAt+1] = 2 }), Ext4, false},
		"xfs":          {xfsHead(0xb4a5), XFS, true},
		"xfs 4":        {xfsHead(0xb4a4), XFS, false},
		"nothing":      {make([]byte, superblockEnd), "", false},
		"short":        {ext4Head(nil)[:superblockEnd-1], "", false},
		"none":         {nil, "", false},
	} {
		k, err := judge(c.head)
		if k != c.kind || (err == nil) != c.ok || err != nil && !errors.Is(err, dr.ErrUnsupported) {
			t.Errorf("%s: %q, %v", name, k, err)
		}
	}
}

// taker answers from free, and for one mounted ext4 on /dev/sda1.
func taker(head []byte, ask func(*volume) ([]extent.Range, error)) (*Taker, Disk) {
	tk := NewTaker()
	tk.ask = ask
	tk.scan = func() blockdev.Machine {
		return blockdev.Machine{Devices: []blockdev.Device{
			device("/dev/sda", "", 0, 100<<20), device("/dev/sda1", "sda", 1<<20, 50<<20, "/"),
		}}
	}
	return tk, Disk{Path: "/dev/sda", Size: 100 << 20, ReadAt: func(b []byte, off int64) (int, error) {
		if off != 1<<20 {
			return 0, errors.New("read elsewhere")
		}
		return copy(b, head), nil
	}}
}

func TestTake(t *testing.T) {
	tk, d := taker(ext4Head(nil), func(v *volume) ([]extent.Range, error) {
		v.Mount = "/"
		return []extent.Range{{Start: 4096, End: 1 << 20}, {Start: 2 << 20, End: 3 << 20}}, nil
	})
	m := tk.Take(t.Context(), d, Ext4)
	want := []extent.Range{{Start: 1<<20 + 4096, End: 2 << 20}, {Start: 3 << 20, End: 4 << 20}}
	if got := slices.Collect(m.Free.All()); !reflect.DeepEqual(got, want) {
		t.Errorf("free %v", got)
	}
	v := Volume{Device: "/dev/sda1", Mount: "/", Kind: Ext4, Free: 2<<20 - 4096}
	if len(m.Volumes) != 1 || m.Volumes[0] != v {
		t.Errorf("volumes %+v", m.Volumes)
	}
}

// TestTakeNothing: what can't be told is used.
func TestTakeNothing(t *testing.T) {
	never := func(*volume) ([]extent.Range, error) { t.Error("asked"); return nil, nil }
	for name, c := range map[string]struct {
		head []byte
		ask  func(*volume) ([]extent.Range, error)
		want error
	}{
		"another kind": {xfsHead(5), never, dr.ErrUnsupported},
		"unknown":      {make([]byte, superblockEnd), never, dr.ErrUnsupported},
		"an error": {ext4Head(nil), func(*volume) ([]extent.Range, error) {
			return []extent.Range{{Start: 0, End: 1}}, dr.ErrCorrupt
		}, dr.ErrCorrupt},
	} {
		tk, d := taker(c.head, c.ask)
		m := tk.Take(t.Context(), d, Ext4)
		if len(m.Volumes) != 1 || !errors.Is(m.Volumes[0].Err, c.want) {
			t.Errorf("%s: %+v", name, m.Volumes)
		}
		if m.Free.Bytes() > 0 {
			t.Errorf("%s: %d bytes are free", name, m.Free.Bytes())
		}
	}
}

// TestHang: a file system that does not answer counts as used, and is not asked again
// before it has answered.
func TestHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release, asked := make(chan struct{}), atomic.Int32{}
		tk, d := taker(ext4Head(nil), func(v *volume) ([]extent.Range, error) {
			asked.Add(1)
			<-release
			return []extent.Range{{Start: 0, End: 1 << 20}}, nil
		})
		for range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			m := tk.Take(ctx, d, Ext4)
			cancel()
			if m.Free.Bytes() != 0 || !errors.Is(m.Volumes[0].Err, dr.ErrUnavailable) {
				t.Fatalf("%d free, %v", m.Free.Bytes(), m.Volumes[0].Err)
			}
		}
		if asked.Load() != 1 {
			t.Errorf("asked %d times", asked.Load())
		}
		close(release)
		synctest.Wait()
		if m := tk.Take(t.Context(), d, Ext4); m.Free.Bytes() != 1<<20 || asked.Load() != 2 {
			t.Errorf("%d free, asked %d times", m.Free.Bytes(), asked.Load())
		}
	})
}
