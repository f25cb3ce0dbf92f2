package quiesce

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// The directories of hooks, and what FARSIDE_PHASE says when they run.
const (
	preFreeze = "pre-freeze"
	postThaw  = "post-thaw"
)

// Point is what hooks are told of the point that is to be made.
type Point struct {
	Machine string // its id
	ID      string // of the tag
	Name    string // of the tag; as people typed it
}

// Hooks are programs that run around a freeze: those in pre-freeze.d before it,
// those in post-thaw.d after it, each in the order of the names.
type Hooks struct {
	// Dir holds the directories pre-freeze.d and post-thaw.d.
	Dir string
	// Run is where each run gets a directory of its own, for what the hooks pass on.
	// It must not lie on a captured disk: /run is the right place.
	Run string
	// Logs is where the output of the newest runs is kept; "" keeps none.
	Logs string
	// Each bounds one hook, Total all hooks of a directory. Defaults 20 s and 60 s.
	Each, Total time.Duration
	// Owner must own hooks and directories. Default 0: root.
	Owner uint32
}

const (
	defaultEach  = 20 * time.Second
	defaultTotal = 60 * time.Second
	maxHooks     = 256
	maxRuns      = 32 // logs that are kept
)

// HookResult is what became of one hook.
type HookResult struct {
	Name     string // of the file
	Phase    string // "pre-freeze" or "post-thaw"
	Err      error  // nil if it ended with exit code 0
	Duration time.Duration
	Output   []byte // bounded; both streams
}

// hookRun is one run of the hooks.
type hookRun struct {
	*Hooks
	point   Point
	mounts  []string
	dir     string // of the run
	began   time.Time
	results []HookResult
	started bool // a hook before the freeze was run
}

// begin makes the directory of a run. The error wraps ErrHook if there are no hooks.
func (h *Hooks) begin(p Point, mounts []string) (*hookRun, error) {
	names, err := h.list(preFreeze)
	if err == nil && len(names) == 0 {
		err = fmt.Errorf("%s holds none: %w", filepath.Join(h.Dir, preFreeze+".d"), ErrHook)
	}
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(h.Run, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of hook runs: %w: %w", ErrHook, err)
	}
	dir, err := os.MkdirTemp(h.Run, "run-")
	if err != nil {
		return nil, fmt.Errorf("make directory of a hook run: %w: %w", ErrHook, err)
	}
	return &hookRun{Hooks: h, point: p, mounts: mounts, dir: dir, began: time.Now()}, nil
}

// list returns the paths of the hooks of a phase, by name. Everything there is
// checked: who may write there may do anything as root.
func (h *Hooks) list(phase string) ([]string, error) {
	dir := filepath.Join(h.Dir, phase+".d")
	if err := h.check(dir, true); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	if err := h.checkSettings(); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list hooks: %w: %w", ErrHook, err)
	}
	var out []string
	for _, e := range entries {
		if ignored(e.Name()) {
			continue
		}
		file := filepath.Join(dir, e.Name())
		if err := h.check(file, false); err != nil {
			return nil, err
		}
		out = append(out, file)
	}
	if len(out) > maxHooks {
		return nil, fmt.Errorf("%s holds %d hooks, at most %d are run: %w", dir, len(out), maxHooks, ErrHook)
	}
	return out, nil
}

// checkSettings refuses a file of settings that anybody but the owner could have written: the
// ready hooks execute it.
func (h *Hooks) checkSettings() error {
	name := filepath.Join(h.Dir, "hooks.conf")
	info, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at settings of hooks: %w: %w", ErrHook, err)
	}
	if owner, known := ownerOf(info); !known || owner != h.Owner || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s is not owned by uid %d, or may be written by others: %w", name, h.Owner, ErrHook)
	}
	return nil
}

// ignored says which names are no hooks: what editors and package managers leave,
// and what somebody set aside.
func ignored(name string) bool {
	if strings.HasPrefix(name, ".") || strings.HasSuffix(name, "~") {
		return true
	}
	return slices.Contains([]string{".disabled", ".bak", ".orig", ".rej", ".swp", ".md", ".rpmnew", ".rpmsave"}, filepath.Ext(name)) ||
		strings.Contains(name, ".dpkg-")
}

// check refuses what anybody but the owner could have written.
func (h *Hooks) check(name string, dir bool) error {
	info, err := os.Stat(name)
	if err != nil {
		return fmt.Errorf("look at hook %s: %w: %w", name, ErrHook, err)
	}
	owner, known := ownerOf(info)
	switch m := info.Mode(); {
	case !known || owner != h.Owner:
		return fmt.Errorf("%s is not owned by uid %d: %w", name, h.Owner, ErrHook)
	case m.Perm()&0o022 != 0:
		return fmt.Errorf("%s may be written by others than its owner (mode %o): %w", name, m.Perm(), ErrHook)
	case dir && !m.IsDir():
		return fmt.Errorf("%s is no directory: %w", name, ErrHook)
	case dir:
		return nil
	case !m.IsRegular():
		return fmt.Errorf("%s is no file: %w", name, ErrHook)
	case m.Perm()&0o100 == 0:
		return fmt.Errorf("%s may not be executed by its owner: %w", name, ErrHook)
	}
	return nil
}

// before runs the hooks that prepare. The first that fails ends it: the error wraps
// ErrHook and names it.
func (r *hookRun) before(ctx context.Context) error {
	names, err := r.list(preFreeze)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(r.Total, defaultTotal))
	defer cancel()
	r.started = true
	for _, name := range names {
		if err := r.one(ctx, preFreeze, name, ""); err != nil {
			return err
		}
	}
	return nil
}

// after runs the hooks that undo, all of them whatever becomes of each; why is the
// reason if the point did not come about.
func (r *hookRun) after(why error) {
	if !r.started {
		return
	}
	names, err := r.list(postThaw)
	if err != nil {
		r.results = append(r.results, HookResult{Phase: postThaw, Err: err})
		return
	}
	// Whatever ends the agent: what was prepared must be undone.
	ctx, cancel := context.WithTimeout(context.Background(), cmp.Or(r.Total, defaultTotal))
	defer cancel()
	reason := ""
	if why != nil {
		reason = why.Error()
	}
	for _, name := range names {
		r.one(ctx, postThaw, name, reason) //nolint:errcheck // it is in the results
	}
}

// one runs one hook and notes what became of it.
func (r *hookRun) one(ctx context.Context, phase, file, reason string) error {
	limit := cmp.Or(r.Each, defaultEach)
	began := time.Now()
	res := HookResult{Name: filepath.Base(file), Phase: phase}
	var err error
	res.Output, err = execute(ctx, file, r.dir, r.environment(phase, reason), limit)
	res.Duration = time.Since(began)
	if err != nil {
		res.Err = fmt.Errorf("hook %s/%s: %w: %w%s", phase, res.Name, ErrHook, err, lastLine(res.Output))
	}
	r.results = append(r.results, res)
	return res.Err
}

// environment is all that a hook gets of it.
func (r *hookRun) environment(phase, reason string) []string {
	result := ""
	if phase == postThaw {
		result = "ok"
		if reason != "" {
			result = "failed"
		}
	}
	return []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=/root",
		"FARSIDE_PHASE=" + phase,
		"FARSIDE_HOOKS=" + r.Dir,
		"FARSIDE_MACHINE=" + r.point.Machine,
		"FARSIDE_TAG=" + r.point.ID,
		"FARSIDE_TAG_NAME=" + strings.ReplaceAll(r.point.Name, "\x00", ""),
		"FARSIDE_MOUNTS=" + strings.Join(r.mounts, "\n"),
		"FARSIDE_RUN=" + r.dir,
		"FARSIDE_RESULT=" + result,
		"FARSIDE_REASON=" + strings.ReplaceAll(reason, "\x00", ""),
		fmt.Sprintf("FARSIDE_TIMEOUT=%d", int(cmp.Or(r.Each, defaultEach).Seconds())),
		fmt.Sprintf("FARSIDE_TOTAL=%d", int(cmp.Or(r.Total, defaultTotal).Seconds())),
	}
}

// lastLine quotes the last line of an output, which says most.
func lastLine(out []byte) string {
	text := strings.TrimSpace(string(out))
	if text == "" {
		return ""
	}
	line := text[strings.LastIndexByte(text, '\n')+1:]
	return fmt.Sprintf(": %.200q", strings.ToValidUTF8(line, "?"))
}

// finish removes the directory of the run, keeps its log, and returns the results
// and the log's name.
func (r *hookRun) finish() ([]HookResult, string) {
	os.RemoveAll(r.dir) //nolint:errcheck // what is left is tried again by Recover
	if r.Logs == "" || len(r.results) == 0 {
		return r.results, ""
	}
	name, err := r.keepLog()
	if err != nil {
		return r.results, "" // a full disk: the point matters more
	}
	return r.results, name
}

func (r *hookRun) keepLog() (string, error) {
	if err := os.MkdirAll(r.Logs, 0o750); err != nil {
		return "", err
	}
	name := filepath.Join(r.Logs, r.began.UTC().Format("20060102T150405.000Z")+logSuffix)
	if err := os.WriteFile(name, r.text(), 0o640); err != nil {
		return "", errors.Join(err, os.Remove(name))
	}
	old, err := filepath.Glob(filepath.Join(r.Logs, "*"+logSuffix))
	if err != nil {
		return "", err
	}
	slices.Sort(old)
	for _, o := range old[:max(0, len(old)-maxRuns)] {
		err = errors.Join(err, os.Remove(o))
	}
	return name, err
}

const logSuffix = ".hooks.log"

// text is the log of a run.
func (r *hookRun) text() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "point %q %s of machine %s, began %s\n", r.point.Name, r.point.ID, r.point.Machine, r.began.UTC().Format(time.RFC3339Nano))
	for _, res := range r.results {
		state := "ok"
		if res.Err != nil {
			state = res.Err.Error()
		}
		fmt.Fprintf(&b, "--- %s/%s %s: %s\n%s", res.Phase, res.Name, res.Duration.Round(time.Millisecond), state, res.Output)
		if n := len(res.Output); n > 0 && res.Output[n-1] != '\n' {
			b.WriteByte('\n')
		}
	}
	return []byte(b.String())
}

// Recover runs the hooks that undo for each run that an earlier process began and
// did not finish, for example because it was killed, and reports their results.
func (h *Hooks) Recover(p Point) []HookResult {
	left, err := filepath.Glob(filepath.Join(h.Run, "run-*"))
	if err != nil || len(left) == 0 {
		return nil
	}
	var out []HookResult
	for _, dir := range left {
		r := &hookRun{Hooks: h, point: p, dir: dir, began: time.Now(), started: true}
		r.after(errUnfinished)
		results, _ := r.finish()
		out = append(out, results...)
	}
	return out
}

var errUnfinished = errors.New("the agent ended while a point was being made")
