//go:build linux

package quiesce

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farside/internal/testenv"
)

// redis is a server that saves only when it is told to.
type redis struct {
	t      *testing.T
	socket string
	cmd    *exec.Cmd
}

func startRedis(t *testing.T, dir string) *redis {
	t.Helper()
	r := &redis{t, filepath.Join(t.TempDir(), "s"), nil}
	r.cmd = exec.Command("redis-server", "--port", "0", "--unixsocket", r.socket, "--dir", dir, "--save", "", "--appendonly", "no")
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.kill)
	for end := time.Now().Add(30 * time.Second); r.do("PING") != "PONG"; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("redis-server does not answer")
		}
	}
	return r
}

func (r *redis) kill() {
	if r.cmd.ProcessState == nil {
		_ = r.cmd.Process.Kill()
		_ = r.cmd.Wait() // says that it was killed
	}
}

func (r *redis) do(args ...string) string {
	out, _ := exec.Command("redis-cli", append([]string{"-s", r.socket}, args...)...).CombinedOutput()
	return strings.TrimSpace(string(out))
}

// TestRedisServer: what a real Redis was told before the hook began is in the dump that lies on the disk when
// the file systems stand still; what came behind it is not, so the hook is what brought it there.
func TestRedisServer(t *testing.T) {
	testenv.NeedTool(t, "redis-server", "redis-cli")
	t.Parallel()
	data, copied := t.TempDir(), t.TempDir()
	r := startRedis(t, data)
	if got := r.do("EVAL", "for i=1,20000 do redis.call('SET', 'k'..i, i) end return 'set'", "0"); got != "set" {
		t.Fatal(got)
	}
	if _, err := os.Stat(data + "/dump.rdb"); err == nil {
		t.Fatal("saved without the hook: this shows nothing")
	}
	h := install(t, "redis", fmt.Sprintf("REDIS_ARGS='-s %s'\n", r.socket))
	text, err := h.around(t, func() {
		r.do("SET", "late", "1")
		dump, err := os.ReadFile(data + "/dump.rdb")
		if err == nil {
			err = os.WriteFile(copied+"/dump.rdb", dump, 0o600)
		}
		if err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	r.kill()
	again := startRedis(t, copied)
	if n, last, late := again.do("DBSIZE"), again.do("GET", "k20000"), again.do("GET", "late"); n != "20000" || last != "20000" || late != "" {
		t.Errorf("%s keys, the last %q, the late one %q", n, last, late)
	}
}
