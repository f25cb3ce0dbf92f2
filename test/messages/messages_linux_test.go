package messages

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

func logsOf(t *testing.T, dirs []string) (logs []*Log) {
	t.Helper()
	for _, d := range dirs {
		l, err := ReadLog(d)
		if err != nil {
			t.Fatal(err)
		}
		logs = append(logs, l)
	}
	return logs
}

// A common state has no violation; logs that are cut at different moments have.
func TestRing(t *testing.T) {
	var dirs []string
	for range 3 {
		dirs = append(dirs, t.TempDir())
	}
	r, err := Start(dirs, 4)
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if l := logsOf(t, dirs[:1]); len(l[0].Received) > 40 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no messages")
		}
	}
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	if bad := Violations(logsOf(t, dirs)); len(bad) > 0 {
		t.Errorf("violations in a common state: %v", bad)
	}
	// The first disk is caught earlier than the rest.
	name := filepath.Join(dirs[0], logName)
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b[:len(b)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if bad := Violations(logsOf(t, dirs)); len(bad) == 0 {
		t.Error("no violation, although one log is older than the others")
	}
}

func TestReadLog(t *testing.T) {
	dir := t.TempDir()
	if l, err := ReadLog(dir); err != nil || len(l.Sent) != 0 {
		t.Errorf("no log yet: %v", err)
	}
	for text, ok := range map[string]bool{
		"S00000000000001\nR0000": true, "S00000000000001\n": true, "X00000000000001\n": false, "S0000000000000x\n": false,
	} {
		if err := os.WriteFile(filepath.Join(dir, logName), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := ReadLog(dir)
		if (err == nil) != ok || ok && !l.Sent[1] {
			t.Errorf("%q: %v, %v", text, l, err)
		}
	}
}
