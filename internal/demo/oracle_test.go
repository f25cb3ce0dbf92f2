package demo

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestOracleFollowsTheLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	o, err := openOracle(path)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	write := func(s string) {
		t.Helper()
		if _, err := w.WriteString(s); err != nil {
			t.Fatal(err)
		}
		if err := o.refresh(); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	if o.count() != 0 || o.returnedBy(1<<62) != 0 {
		t.Error("commits in an empty log")
	}
	write("1 10 20\n2 30")
	if o.count() != 1 {
		t.Errorf("count %d, want 1: half a line is none", o.count())
	}
	write(" 40\n3 50 60\n")
	for at, want := range map[int64]int64{0: 0, 19: 0, 20: 1, 40: 2, 59: 2, 60: 3, 1000: 3} {
		if got := o.returnedBy(at); got != want {
			t.Errorf("returned by %d: %d, want %d", at, got, want)
		}
	}
}

func TestOracleRefusesGaps(t *testing.T) {
	for _, log := range []string{"2 1 2\n", "1 1 2\n3 3 4\n", "nonsense\n", "1 1\n"} {
		path := filepath.Join(t.TempDir(), "log")
		o, err := openOracle(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(log), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := o.refresh(); err == nil {
			t.Errorf("log %q was accepted", log)
		}
		o.Close()
	}
}

func TestContent(t *testing.T) {
	sizes := 0
	for n := range int64(500) {
		c := content(n)
		if len(c) < 1<<10 || len(c) > maxContent {
			t.Fatalf("content of %d: %d bytes", n, len(c))
		}
		if !bytes.Equal(c, content(n)) {
			t.Fatalf("content of %d is not a function of it", n)
		}
		if bytes.Equal(c, content(n+1)) {
			t.Fatalf("%d and %d have equal content", n, n+1)
		}
		sizes += len(c)
	}
	if mean := sizes / 500; mean < meanContent*9/10 || mean > meanContent*11/10 {
		t.Errorf("mean length %d, want about %d", mean, meanContent)
	}
}
