package e2e

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"farside/internal/testenv"
	"farside/test/load"
)

// TestPostgres: PostgreSQL under pgbench, started at 20 random positions. Each time
// pg_amcheck finds nothing, the balances agree, and no marker is missing whose commit
// had returned before. The same judgement finds positions bad when every 20th change is
// dropped.
func TestPostgres(t *testing.T) {
	if load.PostgresBin() == "" {
		testenv.Missing(t, "PostgreSQL with pg_amcheck")
	}
	t.Parallel()
	l := newLab(t, labOptions{size: 448 << 20})
	sockets := l.socketDir()
	data := filepath.Join(l.mount, "pg")
	if err := load.InitPostgres(t.Context(), data, sockets, 2); err != nil {
		t.Fatal(err)
	}
	p, err := load.StartPostgres(t.Context(), data, sockets)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.Bench(ctx, &l.oracle) }()
	l.protect(l.loop.Device)
	l.exact(90 * time.Second)
	time.Sleep(6 * time.Second)
	tag, err := l.stage.Far.Tag(t.Context(), "pgbench has run")
	if err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	l.leave()
	if t.Failed() {
		return
	}
	l.check = func(ctx context.Context, image string) (row int64, err error) {
		dir := filepath.Join(l.dir, "check")
		err = load.WithImage(l.fs, image, dir, func() error {
			row, err = load.CheckPostgres(ctx, filepath.Join(dir, "pg"), sockets)
			return err
		})
		return row, err
	}
	positions := l.positions(rand.New(rand.NewPCG(5, 5)), 20, nil, tag.GetPosition())
	times := l.right(positions)
	t.Logf("%d markers; 20 positions from %v to %v are right", l.oracle.Last(), positions[0], positions[19])
	l.replay(positions, times)
}

// socketDir makes a directory for a socket that everybody may use.
func (l *lab) socketDir() string {
	l.t.Helper()
	dir, err := os.MkdirTemp("", "farside-pg-") // short: a socket's path is
	if err == nil {
		err = os.Chmod(dir, 0o777)
	}
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
