package agent

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// frozenFile is a file on a frozen file system: a write waits until it is thawed.
type frozenFile struct {
	thawed chan struct{}
	mu     sync.Mutex
	bytes.Buffer
}

func (f *frozenFile) Write(b []byte) (int, error) {
	<-f.thawed
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.Buffer.Write(b)
}

func TestPatientLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &frozenFile{thawed: make(chan struct{})}
		log, stop := newPatientLog(slog.New(slog.NewTextHandler(f, &slog.HandlerOptions{Level: slog.LevelInfo})))
		log.Debug("not wanted")
		began := time.Now()
		for i := range maxLogged + 101 {
			log.With("n", i).WithGroup("g").Info("text", "a", 1)
			if i == 0 {
				synctest.Wait() // its write hangs now
			}
		}
		if time.Since(began) != 0 {
			t.Errorf("logging waited %s", time.Since(began))
		}
		if stop(); time.Since(began) != logGrace {
			t.Errorf("the end waited %s", time.Since(began))
		}
		close(f.thawed)
		synctest.Wait()
		text := f.String()
		if !strings.Contains(text, "msg=text n=0 g.a=1") || strings.Contains(text, "not wanted") || !strings.Contains(text, "could not be written\" records=100") {
			t.Errorf("the beginning %.400s", text)
		}
		if n := strings.Count(text, "msg=text"); n != maxLogged+1 {
			t.Errorf("%d records", n)
		}
	})
}

type brokenFile struct{}

func (brokenFile) Write([]byte) (int, error) { return 0, errors.New("no space left on device") }

func TestPatientLogOnFullDisk(t *testing.T) {
	for _, w := range []io.Writer{brokenFile{}, io.Discard} {
		log, stop := newPatientLog(slog.New(slog.NewTextHandler(w, nil)))
		for range 10 {
			log.Info("x")
		}
		stop()
		stop()
	}
}
