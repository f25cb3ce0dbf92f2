package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"farside/internal/agent"
	"farside/internal/confserver"
	"farside/internal/dr"
	"farside/internal/mastertarget"
	"farside/internal/procserver"
)

// configLoaders are the roles' readers of their configuration files, by the name of the sample.
var configLoaders = map[string]func(path string) error{
	"agent":          func(p string) error { _, err := agent.LoadConfig(p); return err },
	"config-server":  func(p string) error { _, err := confserver.LoadConfig(p); return err },
	"master-target":  func(p string) error { _, err := mastertarget.LoadConfig(p); return err },
	"process-server": func(p string) error { _, err := procserver.LoadConfig(p); return err },
}

// TestSampleConfigurations: every sample in the documents is accepted, and with a key too much it is not.
func TestSampleConfigurations(t *testing.T) {
	samples, err := filepath.Glob("../../docs/configuration/*.yaml")
	if err != nil || len(samples) == 0 {
		t.Fatalf("no samples, %v", err)
	}
	for _, sample := range samples {
		name := strings.TrimSuffix(filepath.Base(sample), ".yaml")
		t.Run(name, func(t *testing.T) {
			load := configLoaders[name]
			if load == nil {
				t.Fatalf("%s is of no role", sample)
			}
			if err := load(sample); err != nil {
				t.Error(err)
			}
			text, err := os.ReadFile(sample)
			if err != nil {
				t.Fatal(err)
			}
			spoiled := filepath.Join(t.TempDir(), "spoiled.yaml")
			if err := os.WriteFile(spoiled, append(text, "\nno_such_key: 1\n"...), 0o600); err != nil {
				t.Fatal(err)
			}
			err = load(spoiled)
			if !errors.Is(err, dr.ErrInvalid) || !strings.Contains(err.Error(), "no_such_key") {
				t.Errorf("a key too much: %v", err)
			}
		})
	}
}
