package e2e

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/quiesce"
	"farside/internal/testenv"
	"farside/test/load"
)

// hooked makes settings of an agent with a ready hook and its settings.
func hooked(t *testing.T, name, conf string) map[string]map[string]string {
	t.Helper()
	testenv.NeedRoot(t)
	dir := t.TempDir()
	if _, err := quiesce.InstallHook(dir, name, false); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/hooks.conf", []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	return map[string]map[string]string{"agent": {"points": fmt.Sprintf("{hooks: %q, run: %q}", dir, dir+"/run")}}
}

// hookLog returns what the hooks of the newest point wrote.
func (l *lab) hookLog() string {
	l.t.Helper()
	logs, err := filepath.Glob(filepath.Join(l.dir, "agent/hooks/*"))
	if err != nil || len(logs) == 0 {
		l.t.Fatalf("no log of hooks: %v", err)
	}
	text, err := os.ReadFile(logs[len(logs)-1])
	if err != nil {
		l.t.Fatal(err)
	}
	return string(text)
}

// made is a point with what was known when it was asked for.
type made struct {
	*farsidev1.TagPoint
	before int64  // the last row that was acknowledged before
	redo   string // where PostgreSQL's hook said that recovery would begin
}

var redoLine = regexp.MustCompile(`redo would begin at: ([0-9A-F]+/[0-9A-F]+)`)

// redoOf returns where a recovery of a data directory begins.
func redoOf(data string) (string, error) {
	out, err := exec.Command(filepath.Join(load.PostgresBin(), "pg_controldata"), "-D", data).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("pg_controldata: %w: %s", err, out)
	}
	m := regexp.MustCompile(`REDO location: +([0-9A-F]+/[0-9A-F]+)`).FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("pg_controldata says no redo location: %s", out)
	}
	return string(m[1]), nil
}

// TestPostgresPoints: started from an application point, PostgreSQL's recovery begins at
// the checkpoint of the hook; everything that was committed before is there and whole.
// At a point in between, recovery begins elsewhere.
func TestPostgresPoints(t *testing.T) {
	if load.PostgresBin() == "" {
		testenv.Missing(t, "PostgreSQL with pg_amcheck")
	}
	testenv.NeedTool(t, "psql", "runuser")
	t.Parallel()
	sockets := (&lab{far: far{t: t}}).socketDir()
	l := newLab(t, labOptions{size: 448 << 20, settings: hooked(t, "postgresql", fmt.Sprintf("POSTGRESQL_ARGS='-h %s -d postgres'\n", sockets))})
	data := filepath.Join(l.mount, "pg")
	if err := load.InitPostgres(t.Context(), data, sockets, 2); err != nil {
		t.Fatal(err)
	}
	p, err := load.StartPostgres(t.Context(), data, sockets)
	if err != nil {
		t.Fatal(err)
	}
	l.protect(l.loop.Device)
	l.exact(90 * time.Second)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.Bench(ctx, &l.oracle) }()
	var still, between []made
	for i := range 2 {
		time.Sleep(time.Second)
		m := made{before: l.oracle.Last()}
		m.TagPoint = l.point(fmt.Sprint("between ", i), crash)
		between = append(between, m)
		m = made{before: l.oracle.Last()}
		m.TagPoint = l.point(fmt.Sprint("still ", i), application)
		if found := redoLine.FindStringSubmatch(l.hookLog()); found != nil {
			m.redo = found[1]
		}
		still = append(still, m)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	l.leave()
	for _, m := range append(still, between...) {
		l.judgePostgres(m, sockets, still)
	}
}

// judgePostgres starts PostgreSQL from a point.
func (l *lab) judgePostgres(m made, sockets string, still []made) {
	l.t.Helper()
	dir := filepath.Join(l.dir, "check")
	err := load.WithImage(l.fs, l.image(m.GetPosition()), dir, func() error {
		data := filepath.Join(dir, "pg")
		redo, err := redoOf(data)
		if err != nil {
			return err
		}
		if m.redo != "" && redo != m.redo {
			l.t.Errorf("%s: recovery begins at %s, not at the checkpoint of the hook, %s", m.GetName(), redo, m.redo)
		}
		for _, s := range still {
			if s.redo == "" || m.redo == "" && redo == s.redo && m.GetPosition().GetSeq() > s.GetPosition().GetSeq() {
				continue
			}
			if m.redo == "" && redo == s.redo {
				l.t.Errorf("%s: recovery begins at a checkpoint of a later hook: this shows nothing", m.GetName())
			}
		}
		began := time.Now()
		row, err := load.CheckPostgres(l.t.Context(), data, sockets)
		if err == nil && row < m.before {
			err = fmt.Errorf("marker %d is the last, but %d was committed before", row, m.before)
		}
		l.t.Logf("%s: recovery begins at %s; judged within %s", m.GetName(), redo, time.Since(began).Round(time.Millisecond))
		return err
	})
	if err != nil {
		l.t.Errorf("%s: %v", m.GetName(), err)
	}
}

// TestMariaDBPoints: at an application point, tables of engines without transactions are
// closed and whole and no acknowledged row is missing, though commits are written out only once a
// second. At points in between, tables were not closed.
func TestMariaDBPoints(t *testing.T) {
	testenv.NeedTool(t, load.MariaDBTools...)
	t.Parallel()
	sockets := (&lab{far: far{t: t}}).socketDir()
	socket := filepath.Join(sockets, "s")
	l := newLab(t, labOptions{size: 448 << 20, settings: hooked(t, "mysql", fmt.Sprintf("MYSQL_ARGS='--no-defaults --user=root --socket=%s'\n", socket))})
	data := filepath.Join(l.mount, "db")
	if err := load.InitMariaDB(data); err != nil {
		t.Fatal(err)
	}
	m, err := load.StartMariaDB(data, socket)
	if err != nil {
		t.Fatal(err)
	}
	l.protect(l.loop.Device)
	l.exact(90 * time.Second)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- m.Mark(ctx, &l.oracle) }()
	var still, between []made
	for i := range 2 {
		time.Sleep(time.Second)
		x := made{before: l.oracle.Last()}
		x.TagPoint = l.point(fmt.Sprint("between ", i), crash)
		between = append(between, x)
		x = made{before: l.oracle.Last()}
		x.TagPoint = l.point(fmt.Sprint("still ", i), application)
		still = append(still, x)
	}
	grown := l.oracle.Last()
	time.Sleep(500 * time.Millisecond)
	if l.oracle.Last() == grown {
		t.Error("nothing was written behind the last point: the lock was not given back")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if sessions, err := m.Query("SHOW PROCESSLIST"); err != nil || strings.Count(sessions, "root") > 1 {
		t.Errorf("sessions are left: %s, %v", sessions, err)
	}
	if err := m.Stop(); err != nil {
		t.Error(err)
	}
	l.leave()
	for _, x := range still {
		if err := l.judgeMariaDB(x, socket); err != nil {
			t.Errorf("%s: %v", x.GetName(), err)
		}
	}
	dirty := 0
	for _, x := range between {
		if err := l.judgeMariaDB(x, socket); err != nil {
			dirty++
		}
	}
	if t.Logf("%d of %d points in between had tables that were not closed, or lacked rows", dirty, len(between)); dirty == 0 {
		t.Error("the points in between are clean as well: this shows nothing")
	}
}

func (l *lab) judgeMariaDB(m made, socket string) error {
	l.t.Helper()
	dir := filepath.Join(l.dir, "check")
	return load.WithImage(l.fs, l.image(m.GetPosition()), dir, func() error {
		data := filepath.Join(dir, "db")
		if err := load.CheckMariaDBTables(data); err != nil {
			return err
		}
		rows, err := load.CheckMariaDB(data, socket)
		if err != nil {
			return err
		}
		// Rows are added to one table after the other, so at one instant they differ by one at most.
		for table, n := range rows {
			if n < m.before || n+1 < slices.Max(slices.Collect(maps.Values(rows))) {
				return fmt.Errorf("row %d is the last of table %s of %v; %d was acknowledged before", n, table, rows, m.before)
			}
		}
		l.t.Logf("%s: rows %v, %d were acknowledged before", m.GetName(), rows, m.before)
		return nil
	})
}
