package rolefile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"farside/internal/dr"
)

type config struct {
	Data string  `yaml:"data"`
	Size dr.Size `yaml:"size"`
}

func parse(text []byte) (config, error) {
	c := config{Size: 7}
	return c, Decode(text, &c)
}

func TestDecode(t *testing.T) {
	for text, want := range map[string]config{
		"": {Size: 7}, "data: /d\n": {"/d", 7}, "data: /d\nsize: 1KiB\n": {"/d", 1024}, "# nothing\n": {Size: 7},
	} {
		c := config{Size: 7}
		if err := Decode([]byte(text), &c); err != nil || c != want {
			t.Errorf("%q: %+v, %v", text, c, err)
		}
	}
	for text, says := range map[string]string{
		"date: /d\n": "date", "data: a\ndata: b\n": "data", "data: a\n---\ndata: b\n": "document", "data: [a]\n": "line 1",
		"size: lots\n": "lots", "\x00": "", "data: a\n--- }": "document",
	} {
		if err := Decode([]byte(text), &config{}); !errors.Is(err, dr.ErrInvalid) || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestLoad(t *testing.T) {
	file := filepath.Join(t.TempDir(), "role.yaml")
	if _, err := Load(file, parse); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	for text, bad := range map[string]bool{"data: /d\n": false, "nonsense: 1\n": true} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(file, parse); (err != nil) != bad || bad && !strings.Contains(err.Error(), file) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("data: /d\nsize: 4KiB\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if err := Decode(text, &config{}); err != nil && !errors.Is(err, dr.ErrInvalid) {
			t.Fatalf("error of no kind: %v", err)
		}
	})
}
