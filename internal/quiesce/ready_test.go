//go:build linux

package quiesce

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farside/internal/dr"
	"farside/internal/testenv"
)

// install makes hooks with one of those that come with the program and its settings.
func install(t *testing.T, name, settings string) *Hooks {
	t.Helper()
	h := newHooks(t, nil)
	if _, err := InstallHook(h.Dir, name, false); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.Dir+"/hooks.conf", []byte(settings), 0o600); err != nil {
		t.Fatal(err)
	}
	return h
}

// around runs the hooks, and fn between them, and returns what they wrote.
func (h *Hooks) around(t *testing.T, fn func()) (string, error) {
	t.Helper()
	r, err := h.begin(Point{ID: "t"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = r.before(t.Context())
	if err == nil && fn != nil {
		fn()
	}
	r.after(err)
	rs, _ := r.finish()
	var text strings.Builder
	for _, x := range rs {
		text.Write(x.Output)
		err = errors.Join(err, x.Err)
	}
	return text.String(), err
}

func TestReadyHooks(t *testing.T) {
	t.Parallel()
	all, err := ReadyHooks()
	if err != nil || len(all) != 4 {
		t.Fatalf("%d hooks, %v", len(all), err)
	}
	for _, h := range all {
		if !strings.Contains(h.Text, "$FARSIDE_HOOKS/hooks.conf") || strings.Contains(h.Text, "#") {
			t.Errorf("%s says of itself:\n%s", h.Name, h.Text)
		}
		out, err := exec.Command("sh", "-n", "hooks/"+h.Name).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", h.Name, err, out)
		}
		// An unknown phase, which a later version may have, is refused.
		cmd := exec.Command("sh", "hooks/"+h.Name)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "FARSIDE_PHASE=mid-flight", "FARSIDE_RUN=/nowhere", "FARSIDE_HOOKS=/nowhere"}
		if out, err := cmd.CombinedOutput(); err == nil {
			t.Errorf("%s accepts an unknown phase: %s", h.Name, out)
		}
	}
}

func TestReadyHooksAreClean(t *testing.T) {
	t.Parallel()
	testenv.NeedTool(t, "shellcheck")
	files, err := filepath.Glob("hooks/*")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("shellcheck", append([]string{"--shell=sh"}, files...)...).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestInstallHook(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for range 2 {
		files, err := InstallHook(dir, "redis", false)
		if err != nil || len(files) != 2 {
			t.Fatal(files, err)
		}
	}
	if err := os.WriteFile(dir+"/post-thaw.d/50-redis", []byte("mine"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := InstallHook(dir, "redis", false); !errors.Is(err, dr.ErrExists) {
		t.Errorf("a changed hook: %v", err)
	}
	if _, err := InstallHook(dir, "redis", true); err != nil {
		t.Error(err)
	}
	left, err := filepath.Glob(dir + "/*/.*")
	if err != nil || len(left) != 0 {
		t.Errorf("left behind %v, %v", left, err)
	}
	if _, err := InstallHook("/dev/null", "redis", true); err == nil {
		t.Error("installed into nothing")
	}
}

// fake writes a program that stands for a client.
func fake(t *testing.T, script string) string {
	t.Helper()
	h := newHooks(t, map[string]string{"pre-freeze/client": script})
	return h.Dir + "/pre-freeze.d/client"
}

func TestMongoDBHook(t *testing.T) {
	t.Parallel()
	state := filepath.Join(t.TempDir(), "state")
	client := fake(t, `
echo "$*" >> `+state+`
case $* in
*fsyncLock*) [ -e `+state+`.refuse ] && { echo '{ ok: 0, errmsg: "not master" }'; exit 1; }; touch `+state+`.locked ;;
*fsyncUnlock*) rm `+state+`.locked ;;
esac`)
	h := install(t, "mongodb", "MONGODB_CLIENT="+client+"\nMONGODB_ARGS='mongodb://x/?a=b --tls'\n")
	text, err := h.around(t, func() {
		if _, err := os.Stat(state + ".locked"); err != nil {
			t.Error("not locked between the hooks")
		}
	})
	if err != nil || text != "locked\nunlocked\n" {
		t.Errorf("%v: %s", err, text)
	}
	if _, err := os.Stat(state + ".locked"); err == nil {
		t.Error("still locked")
	}
	calls, err := os.ReadFile(state)
	if err != nil || !strings.HasPrefix(string(calls), "mongodb://x/?a=b --tls --quiet --eval r = db.fsyncLock();") {
		t.Errorf("called %s, %v", calls, err)
	}
	if err := os.WriteFile(state+".refuse", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := h.around(t, nil); !errors.Is(err, ErrHook) || !strings.Contains(err.Error(), "not master") {
		t.Errorf("refused: %v", err)
	}
}

// TestMongoDBHookUndoesItself: if the agent vanishes and nobody comes after it, the lock ends.
func TestMongoDBHookUndoesItself(t *testing.T) {
	t.Parallel()
	state := filepath.Join(t.TempDir(), "state")
	h := install(t, "mongodb", "FARSIDE_TOTAL=-119\nMONGODB_CLIENT="+fake(t, "echo \"$*\" >> "+state)+"\n")
	r, err := h.begin(Point{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.before(t.Context()); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		text, err := os.ReadFile(state)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), "fsyncUnlock") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("locked for ever: %s", text)
		}
	}
}

func TestRedisHook(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ name, progress, status, want string }{
		{"saved", "1 0 1 1 0 0", "ok", ""},
		{"failed", "0 0", "err", "the save failed: err"},
		{"endless", "0 0 1", "ok", "too long"},
		{"down", "", "ok", "no answer"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			state := filepath.Join(t.TempDir(), "state")
			if err := os.WriteFile(state, []byte(tc.progress), 0o600); err != nil {
				t.Fatal(err)
			}
			// Each question is answered with the next of the states, the last again and again.
			client := fake(t, `
[ "$3" = BGSAVE ] && { echo saving >> `+state+`.log; exit 0; }
read -r now rest < `+state+`
[ -z "$now" ] && { echo "Could not connect" >&2; exit 1; }
echo "${rest:-$now}" > `+state+`
printf 'rdb_bgsave_in_progress:%s\r\nrdb_last_bgsave_status:%s\r\n' "$now" `+tc.status)
			h := install(t, "redis", "REDIS_CLIENT="+client+"\nREDIS_ARGS='-p 6380'\nFARSIDE_TIMEOUT=1\n")
			text, err := h.around(t, nil)
			if tc.want == "" && (err != nil || !strings.Contains(text, "saved")) || tc.want != "" && (err == nil || !strings.Contains(text, tc.want)) {
				t.Errorf("%v: %s", err, text)
			}
			if _, err := os.Stat(state + ".log"); (err == nil) == (tc.name == "down") {
				t.Errorf("asked to save: %v", err)
			}
		})
	}
}
