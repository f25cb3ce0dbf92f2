package demo

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"farside/internal/demo/stage"
	"farside/internal/nbd"
)

// fileDisk is a file as an NBD device.
type fileDisk struct {
	*os.File
	size int64
}

func (d fileDisk) Size() int64  { return d.size }
func (d fileDisk) Flush() error { return d.Sync() }

// TestRecordsScene runs load, freeze, disaster and judgement through an NBD server that stands for the tap.
func TestRecordsScene(t *testing.T) {
	const size = 8 << 20
	dir := t.TempDir()
	s, err := newRecords(dir, size, 0, stage.TapURI(dir))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.begin(t.Context()); err == nil {
		t.Error("a load without a tap")
	}
	serveFile(t, s.path(), size, filepath.Join(dir, "tap.sock"))
	if err := s.begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); s.commits().count() < 20; time.Sleep(5 * time.Millisecond) {
		if err := s.commits().refresh(); err != nil || time.Now().After(deadline) {
			t.Fatalf("%d commits, %v, %v", s.commits().count(), err, s.running())
		}
	}
	image := filepath.Join(dir, "replica.img")
	var returned int64
	err = s.frozen(t.Context(), func(_ context.Context, disk io.ReaderAt) error {
		b := make([]byte, size)
		if _, err := disk.ReadAt(b, 0); err != nil {
			return err
		}
		returned = s.commits().count()
		return os.WriteFile(image, b, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.disaster(t.Context()); err != nil {
		t.Fatal(err)
	}
	j, err := s.judge(t.Context(), image)
	if err != nil {
		t.Fatal(err)
	}
	if !j.OK || j.Rows < returned || j.Fsck != "skipped" || j.Read != j.Rows*recordSize || len(j.Sums["disk"]) != 64 || j.Opened.IsZero() {
		t.Errorf("%d commits had returned; got %+v", returned, j)
	}
	if j, err := s.judge(t.Context(), s.path()); err != nil || j.OK {
		t.Errorf("noise passes: %+v, %v", j, err)
	}
	if err := s.close(); err != nil {
		t.Error(err)
	}
	if s.running() == nil {
		t.Error("the load goes on after its end")
	}
}

func serveFile(t *testing.T, path string, size int64, socket string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	server, err := nbd.NewServer(nbd.Config{Lookup: func(string) (*nbd.Export, error) {
		return &nbd.Export{Device: fileDisk{f, size}}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(l)
	t.Cleanup(func() {
		server.Close()
		f.Close()
	})
}
