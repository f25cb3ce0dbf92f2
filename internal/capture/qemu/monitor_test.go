package qemu

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farside/internal/dr"
)

// shortDir is a directory whose sockets have names short enough for the kernel.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "fq")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// fakeMonitor answers on a socket with what play writes.
func fakeMonitor(t *testing.T, play func(c net.Conn)) string {
	t.Helper()
	path := filepath.Join(shortDir(t), "qmp")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			play(c)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return path
}

func TestMonitorOfNoQEMU(t *testing.T) {
	for name, says := range map[string]string{
		"nothing": "", "text": "SSH-2.0-x\r\n", "list": "[1,2]\n", "object": "{}\n", "half": `{"QMP":`,
		"bad answer": "{\"QMP\":{}}\n{\"return\":\n", "end": "{\"QMP\":{}}\n",
		"refusal": "{\"QMP\":{}}\n{\"id\":1,\"error\":{\"class\":\"x\",\"desc\":\"no\"}}\n",
		"long":    "{\"QMP\":\"" + strings.Repeat("x", maxLine) + "\"}\n",
	} {
		path := fakeMonitor(t, func(c net.Conn) { _, _ = c.Write([]byte(says)) })
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if m, err := DialMonitor(ctx, path, nil); err == nil {
			m.Close()
			t.Errorf("%s: taken for a monitor", name)
		}
		cancel()
	}
}

// TestMonitorSilent: a monitor that serves somebody else does not hold us for ever.
func TestMonitorSilent(t *testing.T) {
	stop := make(chan struct{})
	path := fakeMonitor(t, func(net.Conn) { <-stop })
	defer close(stop)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := DialMonitor(ctx, path, nil); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}

func FuzzMonitor(f *testing.F) {
	f.Add([]byte("{\"return\":{},\"id\":1}\n{\"event\":\"X\",\"data\":[]}\n"))
	f.Add([]byte("{\"error\":null,\"id\":2}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		here, there := net.Pipe()
		go func() {
			defer there.Close()
			_, _ = there.Write([]byte("{\"QMP\":{}}\n"))
			_, _ = there.Read(make([]byte, 4096))
			_, _ = there.Write([]byte("{\"return\":{},\"id\":1}\n"))
			_, _ = there.Write(b)
		}()
		m, err := newMonitor(t.Context(), here, nil)
		if err != nil {
			return
		}
		<-m.Done()
		if m.Err() == nil {
			t.Error("ended without an error")
		}
		m.Close()
	})
}
