package agent

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"farside/internal/dr"
	"farside/internal/fsmap"
)

func TestParseConfig(t *testing.T) {
	got, err := ParseConfig([]byte(`
data: /var/lib/farside
memory: 128MiB
capture:
  driver: tap
  ring: 4 MiB
  tap:
    socket: /run/tap.sock
    disks: [{name: one, path: /srv/one.img}]
loop_devices: true
disks: [/srv/two.img]
points: {hooks: /opt/hooks, hook_timeout: 5s}
compare: {every: 24h}
`))
	want := Config{
		Data: "/var/lib/farside", Memory: 128 << 20,
		Capture: CaptureConfig{
			Driver: "tap", Ring: 4 << 20,
			Tap: TapConfig{Socket: "/run/tap.sock", Disks: []TapDisk{{"one", "/srv/one.img"}}},
		},
		LoopDevices: true, Disks: []string{"/srv/two.img"}, Compare: CompareConfig{Every: 24 * time.Hour},
		Points: PointsConfig{Hooks: "/opt/hooks", Run: "/run/farside/points", HookTimeout: 5 * time.Second, HooksTimeout: time.Minute},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
	got, err = ParseConfig([]byte("data: d"))
	if err != nil || got.Memory != 64<<20 || got.Capture.Driver != "auto" || got.Compare.Every != 7*24*time.Hour {
		t.Errorf("defaults: %+v, %v", got, err)
	}
}

func TestParseConfigRefuses(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"empty":         {"", "data: missing"},
		"unknown key":   {"data: d\nspeed: 1", "speed"},
		"unknown below": {"data: d\ncapture: {rings: 1}", "rings"},
		"little memory": {"data: d\nmemory: 1MiB", "memory"},
		"bad size":      {"data: d\nmemory: lots", "lots"},
		"negative size": {"data: d\nmemory: -1", "-1"},
		"huge size":     {"data: d\nmemory: 9999999TiB", "9999999TiB"},
		"driver":        {"data: d\ncapture: {driver: magic}", "magic"},
		"tap not set":   {"data: d\ncapture: {driver: tap}", "capture.tap"},
		"tap no disks":  {"data: d\ncapture: {tap: {socket: s}}", "go together"},
		"tap no name":   {"data: d\ncapture: {tap: {socket: s, disks: [{path: p}]}}", "name and path"},
		"tap twice":     {"data: d\ncapture: {tap: {socket: s, disks: [{name: a, path: p}, {name: b, path: p}]}}", "twice"},
		"free blocks":   {"data: d\ncompare: {skip_free: [ext4, btrfs]}", "skip_free[1]"},
		"hooks":         {"data: d\npoints: {hooks: here}", "absolute"},
		"no patience":   {"data: d\npoints: {hook_timeout: 0s}", "hook_timeout"},
		"hooks shorter": {"data: d\npoints: {hook_timeout: 5s, hooks_timeout: 4s}", "hooks_timeout"},
		"endless hooks": {"data: d\npoints: {hooks_timeout: 48h}", "hooks_timeout"},
		"not yaml":      {"\t", "yaml"},
	} {
		_, err := ParseConfig([]byte(c.text))
		if !errors.Is(err, dr.ErrInvalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want one with %q", name, err, c.want)
		}
	}
}

func TestLoadConfig(t *testing.T) {
	p := filepath.Join(t.TempDir(), "agent.yaml")
	if _, err := LoadConfig(p); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if err := os.WriteFile(p, []byte("data: d\nx: 1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(p); err == nil || !strings.Contains(err.Error(), p) {
		t.Errorf("bad file: %v", err)
	}
	if err := os.WriteFile(p, []byte("data: d"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := LoadConfig(p); err != nil || c.Data != "d" || len(c.Compare.kinds()) != 0 {
		t.Errorf("good file: %+v, %v", c, err)
	}
	c, err := ParseConfig([]byte("data: d\ncompare: {skip_free: [ext4, xfs]}"))
	if err != nil || !slices.Equal(c.Compare.kinds(), []fsmap.Kind{fsmap.Ext4, fsmap.XFS}) {
		t.Errorf("free blocks: %+v, %v", c.Compare, err)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("data: d\nmemory: 64MiB"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := ParseConfig(b); err == nil && (c.Data == "" || c.Memory < minMemory) {
			t.Errorf("accepted %q as %+v", b, c)
		}
	})
}

func TestSampleConfig(t *testing.T) {
	c, err := LoadConfig("../../docs/configuration/agent.yaml")
	if err != nil || c.Capture.Ring != 128<<20 || c.Memory != 64<<20 {
		t.Errorf("sample: %+v, %v", c, err)
	}
}
