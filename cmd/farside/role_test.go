package main

import (
	"context"
	"log/slog"
	"runtime/debug"
	"testing"
)

func TestLazily(t *testing.T) {
	t.Setenv("GOGC", "")
	before := debug.SetGCPercent(77)
	defer debug.SetGCPercent(before)
	percent := func() int {
		p := debug.SetGCPercent(1)
		debug.SetGCPercent(p)
		return p
	}
	run := lazily(func(context.Context, int, *slog.Logger) error {
		if p := percent(); p != lazyGC {
			t.Errorf("collects at %d %%", p)
		}
		return nil
	})
	if err := run(t.Context(), 1, nil); err != nil || percent() != 77 {
		t.Errorf("afterwards %d %%, %v", percent(), err)
	}
	t.Setenv("GOGC", "50")
	if err := lazily(func(context.Context, int, *slog.Logger) error {
		if p := percent(); p != 77 {
			t.Errorf("collects at %d %%, though GOGC is set", p)
		}
		return nil
	})(t.Context(), 1, nil); err != nil {
		t.Error(err)
	}
}
