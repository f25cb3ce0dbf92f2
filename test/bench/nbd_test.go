package bench

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"farside/internal/capture/tap"
	"farside/internal/nbd"
	"farside/internal/testenv"
)

const nbdDisk = 1 << 30

// nbdLoad is one way to use a server.
type nbdLoad struct {
	name  string
	rw    string
	bs    string
	depth int
	unit  string
}

var nbdLoads = []nbdLoad{
	{"nbd 4k randread", "randread", "4k", 16, "IOPS"},
	{"nbd 4k randwrite", "randwrite", "4k", 16, "IOPS"},
	{"nbd 4k randread qd1", "randread", "4k", 1, "IOPS"},
	{"nbd 1M read", "read", "1M", 8, "MB/s"},
	{"nbd 1M write", "write", "1M", 8, "MB/s"},
}

// TestNBDServers compares our server with nbdkit's file plugin and qemu-nbd:
// the same plain file in memory, the same client (fio), in turns, medians.
func TestNBDServers(t *testing.T) {
	testenv.NeedBench(t)
	testenv.NeedTool(t, "fio", "nbdkit", "qemu-nbd")
	dir := memoryDir(t)
	disk := filepath.Join(dir, "disk")
	fill(t, disk)
	servers := map[string]string{
		"ours":     serveOurs(t, dir, disk),
		"nbdkit":   serveNBDKit(t, dir, disk),
		"qemu-nbd": serveQEMU(t, dir, disk),
	}
	for _, load := range nbdLoads {
		got := map[string][]float64{}
		for range Rounds() {
			for name, socket := range servers {
				got[name] = append(got[name], load.run(t, socket))
			}
		}
		for _, peer := range []string{"nbdkit", "qemu-nbd"} {
			ours, theirs := Median(got["ours"]), Median(got[peer])
			Figure{load.name + " vs " + peer, ours, theirs, ours / theirs, load.unit, Rounds()}.Print()
		}
	}
}

func memoryDir(t *testing.T) string {
	if _, err := os.Stat("/dev/shm"); err != nil {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp("/dev/shm", "farside-bench")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func fill(t *testing.T, path string) {
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 1<<20)
	for i := range p {
		p[i] = byte(i*7 + 1)
	}
	for range nbdDisk / len(p) {
		if _, err := f.Write(p); err != nil {
			t.Fatal(err)
		}
	}
}

func serveOurs(t *testing.T, dir, disk string) string {
	f, err := tap.OpenFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return serveDevice(t, dir, &nbd.Export{Device: f})
}

func serveDevice(t *testing.T, dir string, x *nbd.Export) string {
	s, err := nbd.NewServer(nbd.Config{
		Lookup: func(string) (*nbd.Export, error) { return x, nil },
		Log:    func(err error) { t.Log(err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "ours.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
	return socket
}

func serveNBDKit(t *testing.T, dir, disk string) string {
	socket := filepath.Join(dir, "nbdkit.sock")
	return startPeer(t, socket, "nbdkit", "-f", "-U", socket, "file", disk)
}

func serveQEMU(t *testing.T, dir, disk string) string {
	socket := filepath.Join(dir, "qemu.sock")
	return startPeer(t, socket, "qemu-nbd", "-t", "-e", "8", "-f", "raw", "--cache=writeback", "-k", socket, disk)
}

// startPeer runs a server until the test ends and returns when it listens.
func startPeer(t *testing.T, socket, tool string, args ...string) string {
	cmd := exec.Command(tool, args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for range 500 {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			return socket
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s does not listen", tool)
	return ""
}

// run drives one server with fio and returns IOPS or MB/s.
func (l nbdLoad) run(t *testing.T, socket string) float64 {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "fio", "--name=x", "--output-format=json", "--ioengine=nbd",
		"--uri=nbd+unix:///?socket="+socket, "--rw="+l.rw, "--bs="+l.bs, "--iodepth="+strconv.Itoa(l.depth),
		"--size="+strconv.Itoa(nbdDisk), "--time_based", "--runtime=2", "--ramp_time=0.3").Output()
	if err != nil {
		t.Fatalf("fio: %v\n%s", err, out)
	}
	iops, bandwidth := fioResult(t, out)
	if l.unit == "IOPS" {
		return iops
	}
	return bandwidth / 1e6
}

// fioResult returns operations and bytes per second of a run's only job.
func fioResult(t *testing.T, out []byte) (iops, bandwidth float64) {
	var result struct {
		Jobs []struct {
			Read, Write struct {
				IOPS float64 `json:"iops"`
				BW   float64 `json:"bw_bytes"`
			}
		}
	}
	for i, c := range out { // fio may print warnings first
		if c == '{' {
			out = out[i:]
			break
		}
	}
	if err := json.Unmarshal(out, &result); err != nil || len(result.Jobs) != 1 {
		t.Fatalf("fio: %v\n%s", err, out)
	}
	j := result.Jobs[0]
	return j.Read.IOPS + j.Write.IOPS, j.Read.BW + j.Write.BW
}
