package demo

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestMain lets the test binary stand in for farside where the demo starts it: "demo load", "demo watchdog".
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "demo" {
		os.Exit(helper(os.Args[2], os.Args[3:]))
	}
	os.Exit(m.Run())
}

func helper(verb string, args []string) int {
	var err error
	switch verb {
	case "load":
		err = Load(context.Background(), LoadOptions{Rate: 0, Dir: args[2], Log: args[3]}, os.Stdin)
	case "watchdog":
		var limit time.Duration
		if limit, err = time.ParseDuration(args[1]); err == nil {
			err = Watchdog(args[0], limit, os.Stdin, os.Stdout)
		}
	}
	if err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
		return 1
	}
	return 0
}

// loaded makes a database with at least n rows and returns its directory and oracle.
func loaded(t *testing.T, n int64) (string, *oracle) {
	t.Helper()
	dir := t.TempDir()
	log := filepath.Join(t.TempDir(), "log")
	o, err := openOracle(log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- Load(t.Context(), LoadOptions{Dir: dir, Log: log}, r) }()
	for deadline := time.Now().Add(20 * time.Second); o.count() < n; time.Sleep(5 * time.Millisecond) {
		if err := o.refresh(); err != nil || time.Now().After(deadline) {
			t.Fatalf("%d commits, %v", o.count(), err)
		}
	}
	w.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := o.refresh(); err != nil {
		t.Fatal(err)
	}
	return dir, o
}

func check(t *testing.T, dir string) verdict {
	t.Helper()
	db, err := openDatabase(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	v, err := checkDatabase(t.Context(), db)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestDatabaseHoldsWhatWasCommitted(t *testing.T) {
	dir, o := loaded(t, 50)
	if v := check(t, dir); !v.OK || v.Rows != o.count() {
		t.Errorf("got %+v, want %d rows", v, o.count())
	}
}

// TestDatabaseThatIsWrong shows that the check has power.
func TestDatabaseThatIsWrong(t *testing.T) {
	dir, _ := loaded(t, 50)
	for name, statement := range map[string]string{
		"a row is missing":        `DELETE FROM entry WHERE n = 7`,
		"the first is missing":    `DELETE FROM entry WHERE n = 1`,
		"a row has other content": `UPDATE entry SET content = x'00' WHERE n = 9`,
	} {
		t.Run(name, func(t *testing.T) {
			spoiled := t.TempDir()
			b, err := os.ReadFile(filepath.Join(dir, databaseName))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(spoiled, databaseName), b, 0o600); err != nil {
				t.Fatal(err)
			}
			db, err := openDatabase(spoiled)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := db.Exec(statement); err != nil {
				t.Fatal(err)
			}
			db.Close()
			if v := check(t, spoiled); v.OK || v.What == "" {
				t.Errorf("got %+v", v)
			}
		})
	}
	t.Run("garbage within", func(t *testing.T) {
		path := filepath.Join(dir, databaseName)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		copy(b[len(b)/2:], bytes.Repeat([]byte{0xa5}, 8192))
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if v := check(t, dir); v.OK {
			t.Errorf("got %+v", v)
		}
	})
}

func TestLoadNeedsItsDisk(t *testing.T) {
	r, w := io.Pipe()
	defer w.Close()
	err := Load(t.Context(), LoadOptions{Dir: filepath.Join(t.TempDir(), "none"), Log: filepath.Join(t.TempDir(), "log")}, r)
	if err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestPace(t *testing.T) {
	p := newPace(100)
	start := time.Now()
	for range 10 {
		if !p.wait(t.Context()) {
			t.Fatal("ended")
		}
	}
	if took := time.Since(start); took < 80*time.Millisecond {
		t.Errorf("10 rounds at 100 a second took %v", took)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if p.wait(ctx) {
		t.Error("goes on after the end")
	}
}
