package agent

import (
	"fmt"
	"strings"
	"testing"
	"testing/fstest"
)

// machine is a made-up machine: a disk with partitions, loops, layers, media.
func machine() fstest.MapFS {
	m := fstest.MapFS{}
	put := func(name, text string) { m[name] = &fstest.MapFile{Data: []byte(text)} }
	dev := func(dir, size, dev string) {
		put("sys/block/"+dir+"/size", size+"\n")
		put("sys/block/"+dir+"/dev", dev+"\n")
		put("sys/block/"+dir+"/ro", "0\n")
	}
	dev("sda", "2048000", "8:0")
	put("sys/block/sda/device/model", "QEMU HARDDISK   \n")
	put("sys/block/sda/device/serial", "S1\n")
	put("sys/block/sda/queue/rotational", "0\n")
	dev("sda/sda1", "1024000", "8:1")
	put("sys/block/sda/sda1/partition", "1\n")
	dev("sda/sda2", "512000", "8:2")
	put("sys/block/sda/sda2/partition", "2\n")
	dev("cciss!c0d0", "4096", "104:0")
	dev("loop0", "8192", "7:0")
	dev("loop1", "0", "7:1")
	dev("ram0", "8192", "1:0")
	dev("sr0", "8192", "11:0")
	dev("dm-0", "8192", "253:0")
	dev("sdb", "16", "8:16")
	put("sys/block/sdb/ro", "1\n")
	put("proc/self/mountinfo", "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n22 21 8:1 /x /mnt/with\\040space rw - ext4 /dev/sda1 rw\n")
	put("proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n")
	put("srv/disk.img", strings.Repeat("x", 1024))
	put("srv/odd.img", "x")
	return m
}

func describe(fs []found) string {
	var b strings.Builder
	for _, f := range fs {
		fmt.Fprintf(&b, "%s %d %s %q %q %q: %s\n", f.path, f.size, f.kind, f.model, f.serial, f.mounts, f.why)
	}
	return b.String()
}

func TestDiscover(t *testing.T) {
	got := describe(discover(machine(), wanted{paths: []string{"/srv/disk.img", "/srv/odd.img", "/srv/none", "/dev/loop0"}}))
	want := `/dev/cciss/c0d0 2097152 disk "" "" []: 
/dev/dm-0 4194304 device-mapper "" "" []: it is a device of device mapper: protect what lies below (which the kernel does not tell)
/dev/loop0 4194304 loop "" "" []: 
/dev/sda 1048576000 disk "QEMU HARDDISK" "S1" []: 
/dev/sda1 524288000 partition "" "" ["/" "/mnt/with space"]: 
/dev/sda2 262144000 partition "" "" []: it is swap space: nothing of it is of use after a restart (mkswap makes it anew)
/dev/sdb 8192 disk "" "" []: it is read-only
/srv/disk.img 1024 file "" "" []: 
/srv/none 0 file "" "" []: it can't be found
/srv/odd.img 1 file "" "" []: its size is not a multiple of 512 bytes
`
	if got != want {
		t.Errorf("found\n%s\nwant\n%s", got, want)
	}
}

func TestDiscoverLoops(t *testing.T) {
	for _, loops := range []bool{false, true} {
		got := describe(discover(machine(), wanted{loops: loops}))
		if strings.Contains(got, "/dev/loop0") != loops || strings.Contains(got, "loop1") || strings.Contains(got, "ram0") {
			t.Errorf("loops %v: %s", loops, got)
		}
	}
	if got := discover(fstest.MapFS{}, wanted{}); len(got) != 0 {
		t.Errorf("without sysfs: %v", got)
	}
}
