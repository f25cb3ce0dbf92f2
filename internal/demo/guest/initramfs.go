package guest

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// initScript is the guest's init. It mounts, reads and powers off; the marker comes last.
const initScript = `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /mnt
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
for m in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$m; done
sum=$(/bin/busybox sed 's/.*farside.sum=\([-0-9]*\).*/\1/' /proc/cmdline)
marker() { /bin/busybox echo; /bin/busybox echo FARSIDE-REPLICA-READ; }
if [ "$sum" != -1 ]; then
	n=0
	while [ ! -b /dev/vda ] && [ $n -lt 100 ]; do /bin/busybox sleep 0.1; n=$((n+1)); done
fi
if [ "$sum" = -1 ]; then
	marker
elif [ "$sum" = 0 ]; then
	if /bin/busybox mount -t ext4 /dev/vda /mnt; then
		cd /mnt
		for f in *; do
			[ -f "$f" ] && /bin/busybox sha256sum "$f" | /bin/busybox sed 's/^/FARSIDE-SUM /'
		done
		cd /
		/bin/busybox umount /mnt && marker
	fi
else
	s=$(/bin/busybox head -c $sum /dev/vda | /bin/busybox sha256sum) && /bin/busybox echo "FARSIDE-SUM ${s%% *} disk" && marker
fi
/bin/busybox sync
/bin/busybox poweroff -f
`

// wanted are the modules of a virtio disk with ext4. A kernel may have any of them built in; those in optional
// may also not exist at all.
var (
	wanted   = []string{"virtio_pci", "virtio_blk", "crc32c_generic", "ext4"}
	optional = []string{"crc32c_generic"} // part of the kernel proper since 6.15
)

// Initramfs makes the archive that the kernel unpacks: busybox, a script that is run first, and the modules for
// a virtio disk with ext4 and those named; the script loads them from /modules in the order of /modules/order.
func (m *Machine) Initramfs(path, init string, further ...string) error {
	modules, err := m.moduleOrder(slices.Concat(wanted, further))
	if err != nil {
		return err
	}
	busybox, err := os.ReadFile(m.busybox)
	if err != nil {
		return fmt.Errorf("read busybox: %w", err)
	}
	var a archive
	for _, dir := range []string{"bin", "dev", "modules"} {
		a.add(dir, modeDir|0o755, nil)
	}
	a.device("dev/console", 5, 1)
	a.add("bin/busybox", modeFile|0o755, busybox)
	a.add("init", modeFile|0o755, []byte(init))
	var order []string
	for _, mod := range modules {
		a.add("modules/"+mod.name+".ko", modeFile|0o644, mod.content)
		order = append(order, mod.name+".ko")
	}
	a.add("modules/order", modeFile|0o644, []byte(strings.Join(order, "\n")+"\n"))
	if err := os.WriteFile(path, a.bytes(), 0o644); err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	return nil
}

// module is a loadable module with its content, unpacked.
type module struct {
	name    string
	content []byte
	needs   []string
}

// moduleOrder returns the modules to load, each after those that it needs.
func (m *Machine) moduleOrder(names []string) ([]module, error) {
	files, err := moduleFiles(m.modules)
	if err != nil {
		return nil, err
	}
	builtin, err := builtinModules(m.modules)
	if err != nil {
		return nil, err
	}
	var order []module
	var visit func(name string) error
	visit = func(name string) error {
		if builtin[name] || slices.ContainsFunc(order, func(o module) bool { return o.name == name }) {
			return nil
		}
		path, ok := files[name]
		if !ok && slices.Contains(optional, name) {
			return nil
		}
		if !ok {
			return fmt.Errorf("kernel %s has no module %s", filepath.Base(m.modules), name)
		}
		mod, err := readModule(name, path)
		if err != nil {
			return err
		}
		for _, need := range mod.needs {
			if err := visit(need); err != nil {
				return err
			}
		}
		order = append(order, mod)
		return nil
	}
	for _, name := range names {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleName is the name by which modules name each other: that of the file with underscores.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// moduleFiles finds every module file below dir.
func moduleFiles(dir string) (map[string]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(filepath.Join(dir, "kernel"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.Contains(d.Name(), ".ko") {
			files[moduleName(path)] = path
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // all may be built in
		return nil, fmt.Errorf("list modules: %w", err)
	}
	return files, nil
}

func builtinModules(dir string) (map[string]bool, error) {
	text, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("list built-in modules: %w", err)
	}
	builtin := map[string]bool{}
	sc := bufio.NewScanner(bytes.NewReader(text))
	for sc.Scan() {
		builtin[moduleName(sc.Text())] = true
	}
	return builtin, nil
}

// readModule reads a module and what it depends on, from its section .modinfo.
func readModule(name, path string) (module, error) {
	content, err := unpack(path)
	if err != nil {
		return module{}, fmt.Errorf("read module %s: %w", name, err)
	}
	f, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return module{}, fmt.Errorf("read module %s: %w", name, err)
	}
	mod := module{name: name, content: content}
	section := f.Section(".modinfo")
	if section == nil {
		return mod, nil
	}
	info, err := section.Data()
	if err != nil {
		return module{}, fmt.Errorf("read module %s: %w", name, err)
	}
	for field := range bytes.SplitSeq(info, []byte{0}) {
		if list, ok := bytes.CutPrefix(field, []byte("depends=")); ok && len(list) > 0 {
			for need := range strings.SplitSeq(string(list), ",") {
				mod.needs = append(mod.needs, strings.ReplaceAll(need, "-", "_"))
			}
		}
	}
	return mod, nil
}

// unpack reads a module, which distributions compress with tools of their own.
func unpack(path string) ([]byte, error) {
	var tool string
	switch filepath.Ext(path) {
	case ".xz":
		tool = "xz"
	case ".zst":
		tool = "zstd"
	case ".gz":
		tool = "gzip"
	default:
		return os.ReadFile(path)
	}
	out, err := exec.Command(tool, "-dc", path).Output()
	if err != nil {
		return nil, fmt.Errorf("unpack with %s: %w", tool, err)
	}
	return out, nil
}

// isDynamic reports whether a program needs a dynamic linker.
func isDynamic(path string) (bool, error) {
	f, err := elf.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }), nil
}

// File modes of the archive, as in stat(2).
const (
	modeDir    = 0o040000
	modeFile   = 0o100000
	modeDevice = 0o020000
)

// archive is a cpio archive in the "new ASCII" format, which the kernel unpacks: a header of 110 hex digits,
// the name with a zero byte, and the content, each padded to 4 bytes.
type archive struct {
	b     bytes.Buffer
	inode int
}

func (a *archive) add(name string, mode int, content []byte) { a.entry(name, mode, 0, 0, content) }

func (a *archive) device(name string, major, minor int) {
	a.entry(name, modeDevice|0o600, major, minor, nil)
}

func (a *archive) entry(name string, mode, major, minor int, content []byte) {
	a.inode++
	fmt.Fprintf(&a.b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		a.inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name)+1, 0)
	_, _ = io.WriteString(&a.b, name+"\x00")
	a.pad()
	a.b.Write(content)
	a.pad()
}

func (a *archive) pad() {
	for a.b.Len()%4 != 0 {
		a.b.WriteByte(0)
	}
}

// bytes ends the archive and returns it.
func (a *archive) bytes() []byte {
	a.add("TRAILER!!!", 0, nil)
	return a.b.Bytes()
}
