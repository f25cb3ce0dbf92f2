package confserver

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"farside/internal/dr"
)

func TestParseConfig(t *testing.T) {
	got, err := ParseConfig([]byte("data: /d\nlisten: 0.0.0.0:7440\nadvertise: ['a:1', '[::1]:2']\nreport_every: 500ms\n"))
	want := Config{DataDir: "/d", Listen: "0.0.0.0:7440", Advertise: []string{"a:1", "[::1]:2"}, ReportEvery: 500 * time.Millisecond}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	for name, tc := range map[string]struct{ text, says string }{
		"empty":             {"", ""},
		"no data dir":       {"listen: a:1", "data"},
		"no listen":         {"data: d", "listen"},
		"bad listen":        {"data: d\nlisten: hello", "listen"},
		"unknown key":       {"data: d\nlisten: a:1\nlissen: b:1", "lissen"},
		"twice":             {"data: d\ndata: e\nlisten: a:1", "data"},
		"wrong type":        {"data: [d]\nlisten: a:1", ""},
		"no advertise":      {"data: d\nlisten: 0.0.0.0:1", "advertise"},
		"no advertise, v6":  {"data: d\nlisten: '[::]:1'", "advertise"},
		"no advertise, any": {"data: d\nlisten: ':1'", "advertise"},
		"bad advertise":     {"data: d\nlisten: a:1\nadvertise: ['x']", "advertise"},
		"many":              {"data: d\nlisten: a:1\nadvertise: [" + strings.Repeat("'x:1',", 16) + "]", "advertise"},
		"too often":         {"data: d\nlisten: a:1\nreport_every: 1ms", "report_every"},
		"two documents":     {"data: d\nlisten: a:1\n---\na: b", "document"},
		"no YAML":           {"\x00", ""},
	} {
		_, err := ParseConfig([]byte(tc.text))
		if !errors.Is(err, dr.ErrInvalid) || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLoadConfig(t *testing.T) {
	if _, err := LoadConfig(filepath.Join(t.TempDir(), "none.yaml")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	// The sample is a configuration that works.
	if _, err := LoadConfig("../../docs/configuration/config-server.yaml"); err != nil {
		t.Error(err)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("data: /d\nlisten: 127.0.0.1:1\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if c, err := ParseConfig(text); err == nil && (c.DataDir == "" || c.Listen == "") {
			t.Errorf("%q was accepted as %+v", text, c)
		}
	})
}
