package nbdtest

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"farside/internal/testenv"
)

//go:embed judge.py
var script string

// Options describe the export to judge.
type Options struct {
	// CertDir is Certs.Dir when the URI is one of the nbds schemes.
	CertDir string
	// ReadOnly leaves out what changes the export.
	ReadOnly bool
	// MinBlock is the export's minimum block size in bytes; zero is 1.
	MinBlock int
	// Listed says that the server lists the export.
	Listed bool
}

// judge is one run of Judge.
type judge struct {
	uri  string
	size int64
	Options
}

// Judge runs each tool on the export of uri, which has size bytes, as a
// subtest. Size should be 64 MiB at least to include what is about long
// requests; the time grows with it. A tool that is not installed is skipped.
func Judge(t *testing.T, uri string, size int64, o Options) {
	o.MinBlock = max(o.MinBlock, 1)
	j := &judge{uri: uri, size: size, Options: o}
	t.Run("nbdinfo", j.nbdinfo)
	t.Run("nbdsh", j.nbdsh)
	if o.ReadOnly {
		t.Run("nbdcopy", j.copyOut)
		t.Run("qemu-img", j.qemuRead)
		return
	}
	t.Run("nbdcopy", j.nbdcopy)
	t.Run("qemu-img", j.qemuImg)
	t.Run("qemu-io", j.qemuIO)
	t.Run("fio", j.fio)
}

// run runs a tool and returns its output.
func (j *judge) run(t *testing.T, tool string, args ...string) string {
	t.Helper()
	out, err := j.try(tool, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", tool, strings.Join(args, " "), err, out)
	}
	return out
}

func (j *judge) try(tool string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, tool, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, stderr.Bytes())
	}
	return string(out), err
}

// local is the URI for tools that take the certificates from it.
func (j *judge) local() string {
	switch {
	case j.CertDir == "":
		return j.uri
	case strings.Contains(j.uri, "?"):
		return j.uri + "&tls-certificates=" + j.CertDir
	}
	return j.uri + "?tls-certificates=" + j.CertDir
}

func (j *judge) nbdinfo(t *testing.T) {
	testenv.NeedTool(t, "nbdinfo")
	if got := j.run(t, "nbdinfo", "--size", j.local()); strings.TrimSpace(got) != strconv.FormatInt(j.size, 10) {
		t.Errorf("size %s", got)
	}
	var info struct {
		Exports []struct {
			Size     int64 `json:"export-size"`
			ReadOnly bool  `json:"is_read_only"`
		}
	}
	if err := json.Unmarshal([]byte(j.run(t, "nbdinfo", "--json", j.local())), &info); err != nil {
		t.Fatal(err)
	}
	if len(info.Exports) != 1 || info.Exports[0].Size != j.size || info.Exports[0].ReadOnly != j.ReadOnly {
		t.Errorf("information: %+v", info)
	}
	var extents []struct{ Offset, Length int64 }
	if err := json.Unmarshal([]byte(j.run(t, "nbdinfo", "--map", "--json", j.local())), &extents); err != nil {
		t.Fatal(err)
	}
	end := int64(0)
	for _, e := range extents {
		if e.Offset != end || e.Length <= 0 {
			t.Errorf("map: %+v does not continue at %d", e, end)
		}
		end = e.Offset + e.Length
	}
	if end != j.size {
		t.Errorf("map ends at %d of %d", end, j.size)
	}
	_, name, _ := j.place(t)
	list, err := j.try("nbdinfo", "--list", "--json", j.local())
	if listed := err == nil && strings.Contains(list, strconv.Quote(name)); listed != j.Listed {
		t.Errorf("listed: %v, %v\n%s", listed, err, list)
	}
}

func (j *judge) nbdsh(t *testing.T) {
	python := "/usr/bin/python3" // distributions put the module there, not into others
	if out, err := j.try(python, "-c", "import nbd"); err != nil {
		testenv.NeedTool(t, "nbdsh")
		t.Skipf("python has no nbd module: %v %s", err, out)
	}
	mode := "rw"
	if j.ReadOnly {
		mode = "ro"
	}
	out := j.run(t, python, "-c", script, j.uri, strconv.FormatInt(j.size, 10), strconv.Itoa(j.MinBlock), mode, j.CertDir)
	if !strings.Contains(out, "judged") {
		t.Errorf("the script ended early: %s", out)
	}
}

// image makes a file as large as the export, partly noise, partly holes.
func (j *judge) image(t *testing.T, seed uint64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(j.size); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	for off := int64(0); off < j.size; {
		n := min(j.size-off, 4096*(1+rng.Int64N(256)))
		if rng.IntN(2) == 0 {
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			if _, err := f.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
		off += n
	}
	return path
}

func same(t *testing.T, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x, y) {
		t.Errorf("%s (%d bytes) and %s (%d bytes) differ", a, len(x), b, len(y))
	}
}

func (j *judge) nbdcopy(t *testing.T) {
	testenv.NeedTool(t, "nbdcopy")
	in, out := j.image(t, 1), filepath.Join(t.TempDir(), "out")
	j.run(t, "nbdcopy", "--flush", "--destination-is-zero", "/dev/null", "null:") // the tool itself
	j.run(t, "nbdcopy", "--flush", in, j.local())
	j.run(t, "nbdcopy", j.local(), out)
	same(t, in, out)
	j.run(t, "nbdcopy", "--synchronous", "--no-extents", "--connections=1", j.local(), out)
	same(t, in, out)
}

func (j *judge) copyOut(t *testing.T) {
	testenv.NeedTool(t, "nbdcopy")
	a, b := filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")
	j.run(t, "nbdcopy", j.local(), a)
	j.run(t, "nbdcopy", "--no-extents", "--synchronous", j.local(), b)
	same(t, a, b)
}

// place takes the URI apart: QEMU's options for the server, and the name.
func (j *judge) place(t *testing.T) (server, name string, tls bool) {
	t.Helper()
	u, err := url.Parse(j.uri)
	if err != nil {
		t.Fatal(err)
	}
	name = strings.TrimPrefix(u.Path, "/")
	tls = strings.HasPrefix(u.Scheme, "nbds")
	if s := u.Query().Get("socket"); s != "" {
		return "server.type=unix,server.path=" + s, name, tls
	}
	return "server.type=inet,server.host=" + u.Hostname() + ",server.port=" + u.Port(), name, tls
}

// qemu returns the arguments that make a QEMU tool open the export.
func (j *judge) qemu(t *testing.T) (object []string, image string) {
	t.Helper()
	server, name, tls := j.place(t)
	image = "driver=nbd," + server + ",export=" + name
	if !tls {
		return nil, image
	}
	if strings.Contains(server, "type=unix") {
		image += ",tls-hostname=localhost"
	}
	return []string{"--object", "tls-creds-x509,id=tls0,endpoint=client,dir=" + j.CertDir}, image + ",tls-creds=tls0"
}

func (j *judge) qemuImg(t *testing.T) {
	testenv.NeedTool(t, "qemu-img")
	object, image := j.qemu(t)
	in, out := j.image(t, 2), filepath.Join(t.TempDir(), "out")
	args := append([]string{"convert", "-n"}, object...)
	args = append(args, "--target-image-opts", "-f", "raw", in, image)
	j.run(t, "qemu-img", args...)
	args = append([]string{"convert"}, object...)
	j.run(t, "qemu-img", append(args, "--image-opts", image, "-O", "raw", out)...)
	same(t, in, out)
	j.qemuRead(t)
}

// qemuRead compares the export with a copy of it and looks at the map.
func (j *judge) qemuRead(t *testing.T) {
	testenv.NeedTool(t, "qemu-img")
	object, image := j.qemu(t)
	copied := filepath.Join(t.TempDir(), "copy")
	args := append([]string{"convert"}, object...)
	j.run(t, "qemu-img", append(args, "--image-opts", image, "-O", "qcow2", copied)...)
	args = append([]string{"compare"}, object...)
	j.run(t, "qemu-img", append(args, "--image-opts", image, "driver=qcow2,file.driver=file,file.filename="+copied)...)
	args = append([]string{"map", "--output=json"}, object...)
	var extents []struct{ Start, Length int64 }
	out := j.run(t, "qemu-img", append(args, "--image-opts", image)...)
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatal(err)
	}
	if last := extents[len(extents)-1]; extents[0].Start != 0 || last.Start+last.Length != j.size {
		t.Errorf("map %s", out)
	}
}

func (j *judge) qemuIO(t *testing.T) {
	testenv.NeedTool(t, "qemu-io")
	object, image := j.qemu(t)
	args := append(object, "--image-opts", image)
	for _, c := range []string{
		"write -P 0x11 0 2M", "write -P 0x22 512k 64k", "write -f -P 0x33 1M 4k", "flush",
		"write -z 1536k 128k", "write -z -u 1664k 128k", "discard 3M 1M",
		"read -P 0x11 0 512k", "read -P 0x22 512k 64k", "read -P 0x33 1M 4k", "read -P 0 1536k 256k",
		"aio_write -P 0x44 4M 1M", "aio_write -P 0x55 5M 1M", "aio_write -z 6M 1M", "aio_flush",
		"read -P 0x44 4M 1M", "read -P 0x55 5M 1M", "read -P 0 6M 1M",
		fmt.Sprintf("write -P 0x66 %d 512", j.size-512), fmt.Sprintf("read -P 0x66 %d 512", j.size-512),
		"write -P 0x77 7170k 1030", "read -P 0x77 7170k 1030", // not aligned: QEMU reads and modifies
	} {
		args = append(args, "-c", c)
	}
	if out := j.run(t, "qemu-io", args...); strings.Contains(out, "failed") || strings.Contains(out, "error") {
		t.Errorf("qemu-io:\n%s", out)
	}
}

func (j *judge) fio(t *testing.T) {
	testenv.NeedTool(t, "fio")
	if j.CertDir != "" {
		t.Skip("fio can't be told where the certificates are")
	}
	for _, load := range [][]string{
		{"--rw=randrw", "--bsrange=4k-64k", "--iodepth=32"},
		{"--rw=write", "--bs=1M", "--iodepth=8"},
		{"--rw=randwrite", "--bs=4k", "--iodepth=16", "--fsync=32"},
	} {
		args := []string{
			"--name=judge", "--ioengine=nbd", "--uri=" + j.uri, "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0",
			"--size=" + strconv.FormatInt(min(j.size, 64<<20), 10), "--randseed=7",
		}
		j.run(t, "fio", append(args, load...)...)
	}
}
