package quiesce

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"farside/internal/dr"
)

//go:embed hooks
var readyHooks embed.FS

// ReadyHook is a hook that comes with the program.
type ReadyHook struct {
	Name string // postgresql, mysql, ...
	Text string // what it does: the comment at its top
}

// ReadyHooks lists the hooks that come with the program, by name.
func ReadyHooks() ([]ReadyHook, error) {
	entries, err := readyHooks.ReadDir("hooks")
	if err != nil {
		return nil, err
	}
	var out []ReadyHook
	for _, e := range entries {
		script, err := readyHooks.ReadFile("hooks/" + e.Name())
		if err != nil {
			return nil, err
		}
		out = append(out, ReadyHook{Name: e.Name(), Text: comment(string(script))})
	}
	return out, nil
}

// comment returns the comment at the top of a script, without what marks it as one.
func comment(script string) string {
	var b strings.Builder
	for line := range strings.Lines(script) {
		text, ok := strings.CutPrefix(line, "#")
		if !ok {
			break
		}
		if !strings.HasPrefix(text, "!") {
			b.WriteString(strings.TrimPrefix(text, " "))
		}
	}
	return b.String()
}

// readyOrder is where the ready hooks stand among others.
const readyOrder = "50-"

// InstallHook writes a hook that comes with the program into both directories below dir, which are made
// if need be, and returns the files. One that is there already and differs is only
// replaced by force. Errors wrap dr.ErrNotFound if there is no such hook, dr.ErrExists.
func InstallHook(dir, name string, force bool) ([]string, error) {
	script, err := readyHooks.ReadFile("hooks/" + name)
	if err != nil || strings.ContainsAny(name, `/\`) {
		return nil, fmt.Errorf("install hook %q: %w", name, dr.ErrNotFound)
	}
	var files []string
	for _, phase := range []string{preFreeze, postThaw} {
		d := filepath.Join(dir, phase+".d")
		if err := os.MkdirAll(d, 0o755); err != nil {
			return files, fmt.Errorf("install hook %s: %w", name, err)
		}
		file := filepath.Join(d, readyOrder+name)
		if err := installFile(file, script, force); err != nil {
			return files, fmt.Errorf("install hook %s: %w", name, err)
		}
		files = append(files, file)
	}
	return files, nil
}

func installFile(file string, script []byte, force bool) error {
	have, err := os.ReadFile(file)
	switch {
	case err == nil && bytes.Equal(have, script):
		return os.Chmod(file, 0o755)
	case err == nil && !force:
		return fmt.Errorf("%s differs: %w", file, dr.ErrExists)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	// A hook that runs now must not see half of it.
	next := filepath.Join(filepath.Dir(file), "."+filepath.Base(file)+".new")
	if err := os.WriteFile(next, script, 0o755); err != nil {
		return err
	}
	if err := errors.Join(os.Chmod(next, 0o755), os.Rename(next, file)); err != nil {
		return errors.Join(err, os.Remove(next))
	}
	return nil
}
