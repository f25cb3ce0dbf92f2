package control

import (
	"errors"
	"runtime"
	"testing"
	"time"

	"connectrpc.com/connect"

	"farside/internal/api"
	"farside/internal/dr"
)

func TestBackoff(t *testing.T) {
	var b backoff
	longest := time.Duration(0)
	for range 100 {
		d := b.next()
		if d < firstWait/2 || d > longWait {
			t.Fatalf("waits %v", d)
		}
		longest = max(longest, d)
	}
	if longest < longWait/2 {
		t.Errorf("never waits longer than %v", longest)
	}
	b.reset()
	if d := b.next(); d > firstWait {
		t.Errorf("after success waits %v", d)
	}
}

func TestExplain(t *testing.T) {
	for kind, want := range map[string]error{
		api.KindInvalid: dr.ErrInvalid, api.KindNotFound: dr.ErrNotFound, api.KindDenied: dr.ErrDenied,
		api.KindTimeout: dr.ErrUnavailable, "new": dr.ErrUnavailable,
	} {
		if err := explain(api.NewError(connect.CodeUnknown, kind, errors.New("x"))); !errors.Is(err, want) {
			t.Errorf("%s: %v", kind, err)
		}
	}
	if explain(nil) != nil {
		t.Error("nothing became an error")
	}
	if err := explain(errors.New("dial")); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("other: %v", err)
	}
}

func TestHost(t *testing.T) {
	h := Host()
	if h.GetOs() != runtime.GOOS || h.GetCpus() < 1 {
		t.Errorf("host %v", h)
	}
	if runtime.GOOS == "linux" && (h.GetKernel() == "" || h.GetBootId() == "" || h.GetMemoryBytes() == 0 || h.GetBootNs() == 0) {
		t.Errorf("host %v", h)
	}
}
