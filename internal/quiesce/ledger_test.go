package quiesce

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"farside/internal/dr"
)

func TestThawLeftRefuses(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "frozen")
	if got, err := ThawLeft(file); err != nil || got != nil {
		t.Errorf("no ledger: %v, %v", got, err)
	}
	for _, text := range []string{"", "nonsense", `[{"mount":"relative","id":"1"}]`, `[{"mount":"/x"}]`, `{}`} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ThawLeft(file); !errors.Is(err, dr.ErrCorrupt) {
			t.Errorf("%q: %v", text, err)
		}
		if _, err := os.Stat(file); err == nil {
			t.Errorf("%q is kept", text)
		}
	}
	// What is there is thawed only if it is the mount that was frozen, and is frozen.
	if err := os.WriteFile(file, []byte(`[{"mount":"/","id":"99999999"},{"mount":"/nowhere","id":"1"}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := ThawLeft(file); err != nil || len(got) != 0 {
		t.Errorf("thawed %v, %v", got, err)
	}
}

func FuzzParseLedger(f *testing.F) {
	f.Add([]byte(`[{"mount":"/srv","id":"31"}]`))
	f.Add([]byte(`[{}]`))
	f.Fuzz(func(t *testing.T, text []byte) {
		all, err := parseLedger(text)
		if err != nil && !errors.Is(err, dr.ErrCorrupt) {
			t.Errorf("error without kind: %v", err)
		}
		for _, e := range all {
			if !filepath.IsAbs(e.Mount) || e.ID == "" {
				t.Errorf("%q makes %+v", text, e)
			}
		}
	})
}
