//go:build linux

package qemu

import (
	"bytes"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// abandon leaves everything in QEMU as the end of our process does.
func abandon(s *Source) {
	s.monitor.Close()
	s.writers.mu.Lock()
	defer s.writers.mu.Unlock()
	for _, c := range s.writers.mu.conns {
		c.Close()
	}
	for _, i := range s.images {
		i.Client.Close()
	}
}

// ends waits until Next fails.
func ends(t *testing.T, s *Source) error {
	t.Helper()
	for range 200 {
		if _, err := s.Next(t.Context(), 20*time.Millisecond, func(capture.Event) error { return nil }); err != nil {
			return err
		}
	}
	t.Fatal("the source goes on")
	return nil
}

// TestAgentGone: the guest's writes go on, and the next process takes over.
func TestAgentGone(t *testing.T) {
	m := start(t, 4<<20, 4<<20)
	first := open(t, m.guest(), 0)
	m.must(0, "write -P 1 0 4k")
	abandon(first)
	for range 3 {
		m.must(0, "write -P 2 0 64k")
		m.must(1, "write -P 3 0 64k")
	}
	m.must(0, "flush")
	second := open(t, m.guest(), 0)
	images := map[dr.DiskID][]byte{3: m.image(0), 4: m.image(1)}
	m.must(0, "write -P 4 8k 64k")
	m.must(1, "write -P 5 8k 64k")
	if n := replay(t, second, images); n != 2 {
		t.Errorf("%d changes, want 2", n)
	}
	if !bytes.Equal(images[3], m.image(0)) || !bytes.Equal(images[4], m.image(1)) {
		t.Error("the second stream gives something else than the images")
	}
}

// TestCloseLeavesNothing: no job, node, export or server of ours stays in QEMU.
func TestCloseLeavesNothing(t *testing.T) {
	m := start(t, 4<<20)
	g := m.guest()
	for range 2 {
		s := open(t, g, 0)
		m.must(0, "write -P 1 0 4k")
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Next(t.Context(), 0, nil); !errors.Is(err, dr.ErrUnavailable) {
			t.Errorf("next after close: %v", err)
		}
	}
	var exports []struct{ ID string }
	if err := m.control.Run(t.Context(), "query-block-exports", nil, &exports); err != nil || len(exports) != 0 {
		t.Errorf("exports %v, %v", exports, err)
	}
	nodes, err := findNodes(t.Context(), m.control)
	if err != nil {
		t.Fatal(err)
	}
	for name := range nodes {
		if ours(name) {
			t.Errorf("node %s is left", name)
		}
	}
	addr := map[string]any{"addr": unixAddress(filepath.Join(m.dir, "other.sock"))}
	if err := m.control.Run(t.Context(), "nbd-server-start", addr, nil); err != nil {
		t.Errorf("the NBD server is left: %v", err)
	}
}

// TestCancelledByHand: somebody ends one of two mirrors. Nothing that comes later is handed over, and
// the source does not vouch any more.
func TestCancelledByHand(t *testing.T) {
	m := start(t, 4<<20, 4<<20)
	s := open(t, m.guest(), 0)
	if err := m.control.Run(t.Context(), "job-cancel", map[string]any{"id": ourID("mirror", 3)}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Verify(t.Context()); err == nil || errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("verify: %v", err)
	}
	if err := ends(t, s); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("next: %v", err)
	}
	if !s.Stats().Detached {
		t.Error("not detached")
	}
}

// TestOneConnectionLost: the other disk's changes, which may depend on what is missing, are not handed over.
func TestOneConnectionLost(t *testing.T) {
	m := start(t, 4<<20, 4<<20)
	s := open(t, m.guest(), 0)
	s.stop() // the watcher must not find it first
	<-s.watched
	m.must(1, "write -P 1 0 4k")
	s.writers.mu.Lock()
	s.writers.mu.conns[0].(*net.UnixConn).CloseWrite()
	s.writers.mu.Unlock()
	m.must(0, "write -P 1 0 4k") // lost
	m.must(1, "write -P 2 0 4k") // must not come without the one before
	n, err := s.Next(t.Context(), time.Second, func(capture.Event) error { return nil })
	if n != 0 || !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("%d events, %v", n, err)
	}
}

func TestQEMUGone(t *testing.T) {
	m := start(t, 4<<20)
	g := m.guest()
	s := open(t, g, 0)
	m.quit()
	if err := ends(t, s); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("next: %v", err)
	}
	if _, err := s.Verify(t.Context()); err == nil || errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("verify: %v", err)
	}
	if _, err := g.Disks(t.Context()); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("disks: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	m.boot()
	s = open(t, g, 0)
	m.must(0, "write -P 1 0 4k")
	images := map[dr.DiskID][]byte{3: make([]byte, 4<<20)}
	if n := replay(t, s, images); n != 1 {
		t.Errorf("%d changes after the restart", n)
	}
}

func TestOpenRefuses(t *testing.T) {
	m := start(t, 4<<20)
	g := m.guest()
	for _, path := range []string{"qemu:nobody", "drive1", "/dev/sda"} {
		if _, err := g.Open(t.Context(), []capture.Disk{{ID: 3, Path: path}}, 0); !errors.Is(err, dr.ErrNotFound) {
			t.Errorf("%s: %v", path, err)
		}
	}
	addr := map[string]any{"addr": unixAddress(filepath.Join(m.dir, "other.sock"))}
	if err := m.control.Run(t.Context(), "nbd-server-start", addr, nil); err != nil {
		t.Fatal(err)
	}
	_, err := g.Open(t.Context(), []capture.Disk{{ID: 3, Path: "qemu:drive1"}}, 0)
	if err == nil || !strings.Contains(err.Error(), "one NBD server") {
		t.Errorf("with a foreign NBD server: %v", err)
	}
	if err := m.control.Run(t.Context(), "nbd-server-stop", nil, nil); err != nil {
		t.Errorf("the foreign NBD server was stopped: %v", err)
	}
	if _, err := New(Options{Monitor: filepath.Join(m.dir, "image0")}).Disks(t.Context()); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("a file as monitor: %v", err)
	}
	m.must(0, "write -P 1 0 4k")
	open(t, g, 0)
}

// TestLastWritesOfOnlyDisk: QEMU ends while events wait; they are handed over before the error.
func TestLastWritesOfOnlyDisk(t *testing.T) {
	m := start(t, 4<<20)
	s := open(t, m.guest(), 0)
	images := map[dr.DiskID][]byte{3: make([]byte, 4<<20)}
	for i := range 40 {
		m.must(0, "write -P %d %dk 64k", i+1, i*64)
	}
	m.quit()
	for {
		_, err := s.Next(t.Context(), time.Second, func(e capture.Event) error {
			copy(images[3][e.Extent.Offset:], e.Data)
			return nil
		})
		if err != nil {
			break
		}
	}
	if !bytes.Equal(images[3], m.image(0)) {
		t.Error("the last writes are missing")
	}
}
