package load

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Postgres is a PostgreSQL server on a directory, run as the user postgres, that is
// reached through a Unix socket only.
type Postgres struct {
	data    string // data directory
	sockets string // directory of the socket
	server  *exec.Cmd
	ended   chan error
}

// PostgresBin returns the directory of PostgreSQL's programs, or "".
func PostgresBin() string {
	all, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pg_amcheck") // only a bad pattern is an error
	if len(all) == 0 {
		return ""
	}
	return filepath.Dir(slices.Max(all))
}

// asPostgres makes cmd run as the user postgres; it dies with the caller.
func asPostgres(cmd *exec.Cmd) error {
	u, err := user.Lookup("postgres")
	if err != nil {
		return err
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)},
		Pdeathsig:  syscall.SIGKILL,
	}
	return errors.Join(err1, err2)
}

func postgresTool(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(PostgresBin(), name), args...)
	if err := asPostgres(cmd); err != nil {
		return "", err
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// InitPostgres makes a data directory, which must not be there, for pgbench and markers.
func InitPostgres(ctx context.Context, data, sockets string, scale int) error {
	u, err := user.Lookup("postgres")
	if err != nil {
		return err
	}
	if err := os.Mkdir(data, 0o700); err != nil {
		return err
	}
	if _, err := run("chown", u.Uid, data); err != nil {
		return err
	}
	if _, err := postgresTool(ctx, "initdb", "-D", data, "-A", "trust", "--no-locale", "-E", "UTF8"); err != nil {
		return err
	}
	p, err := StartPostgres(ctx, data, sockets)
	if err != nil {
		return err
	}
	_, err1 := p.query(ctx, "postgres", "CREATE TABLE markers(n bigint PRIMARY KEY, filler text); CREATE EXTENSION amcheck")
	_, err2 := postgresTool(ctx, "pgbench", "-h", sockets, "-q", "-i", "-s", strconv.Itoa(scale), "postgres")
	return errors.Join(err1, err2, p.Stop())
}

// StartPostgres starts a server and waits until it answers: it has recovered then.
func StartPostgres(ctx context.Context, data, sockets string) (*Postgres, error) {
	p := &Postgres{data: data, sockets: sockets, ended: make(chan error, 1)}
	p.server = exec.Command(filepath.Join(PostgresBin(), "postgres"), "-D", data, "-k", sockets,
		"-c", "listen_addresses=", "-c", "shared_buffers=16MB", "-c", "max_wal_size=64MB", "-c", "min_wal_size=32MB", "-c", "checkpoint_timeout=30s")
	if err := asPostgres(p.server); err != nil {
		return nil, err
	}
	var said strings.Builder
	p.server.Stdout, p.server.Stderr = &said, &said
	if err := p.server.Start(); err != nil {
		return nil, fmt.Errorf("start postgres: %w", err)
	}
	go func() { p.ended <- p.server.Wait() }()
	for until := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		_, err := p.query(ctx, "postgres", "SELECT 1")
		if err == nil {
			return p, nil
		}
		select {
		case e := <-p.ended:
			return nil, fmt.Errorf("postgres ended: %w: %s", errors.Join(e, io.ErrUnexpectedEOF), said.String())
		default:
		}
		if time.Now().After(until) || ctx.Err() != nil {
			_ = p.server.Process.Kill() // nothing more is wanted of it
			return nil, fmt.Errorf("postgres does not answer: %w: %s", errors.Join(err, <-p.ended), said.String())
		}
	}
}

// Stop ends the server in good order, as "fast" does.
func (p *Postgres) Stop() error {
	if err := p.server.Process.Signal(syscall.SIGINT); err != nil {
		return fmt.Errorf("stop postgres: %w", err)
	}
	select {
	case err := <-p.ended:
		return err
	case <-time.After(30 * time.Second):
		return errors.Join(errors.New("stop postgres: not within 30 s"), p.server.Process.Kill())
	}
}

func (p *Postgres) query(ctx context.Context, db, sql string) (string, error) {
	out, err := postgresTool(ctx, "psql", "-h", p.sockets, "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-d", db, "-c", sql)
	return strings.TrimSpace(out), err
}

// Bench runs pgbench beside a client that commits numbered markers, which it records
// once they are durable, until ctx ends.
func (p *Postgres) Bench(ctx context.Context, o recorder) error {
	bench := exec.Command(filepath.Join(PostgresBin(), "pgbench"), "-h", p.sockets, "-n", "-c", "4", "-T", "3600", "postgres")
	if err := asPostgres(bench); err != nil {
		return err
	}
	if err := bench.Start(); err != nil {
		return fmt.Errorf("start pgbench: %w", err)
	}
	err := p.mark(ctx, o)
	kill := bench.Process.Kill()
	_ = bench.Wait() // killed
	return errors.Join(err, kill)
}

// BenchAt runs pgbench at a rate of transactions per second, for a time in whole seconds.
func (p *Postgres) BenchAt(ctx context.Context, rate int, length time.Duration) error {
	_, err := postgresTool(ctx, "pgbench", "-h", p.sockets, "-n", "-c", "4", "-R", strconv.Itoa(rate),
		"-T", strconv.Itoa(int(length/time.Second)), "postgres")
	return err
}

// mark commits markers through one psql, whose answer to each it awaits.
func (p *Postgres) mark(ctx context.Context, o recorder) error {
	cmd := exec.Command(filepath.Join(PostgresBin(), "psql"), "-h", p.sockets, "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", "postgres")
	if err := asPostgres(cmd); err != nil {
		return err
	}
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	cmd.Stderr = os.Stderr
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		return fmt.Errorf("start psql: %w", err)
	}
	said := bufio.NewReader(out)
	var err error
	for row := int64(1); ctx.Err() == nil && err == nil; row++ {
		if _, err = fmt.Fprintf(in, "INSERT INTO markers VALUES (%d, repeat('x', 200));\n", row); err == nil {
			_, err = said.ReadString('\n')
		}
		if err == nil {
			o.Record(row, time.Now())
		}
		pause(ctx, time.Millisecond)
	}
	return errors.Join(err, in.Close(), cmd.Wait())
}

// CheckPostgres starts a server on a recovered data directory and judges it: pg_amcheck of
// all tables and indexes, the balances of pgbench, and no marker missing below the
// highest, which it returns.
func CheckPostgres(ctx context.Context, data, sockets string) (row int64, err error) {
	p, err := StartPostgres(ctx, data, sockets)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, p.Stop()) }()
	if _, err := postgresTool(ctx, "pg_amcheck", "-h", sockets, "--heapallindexed", "-d", "postgres"); err != nil {
		return 0, err
	}
	sums, err := p.query(ctx, "postgres", `SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(bbalance) FROM pgbench_branches)
		AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(tbalance) FROM pgbench_tellers)
		AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)`)
	if err != nil || sums != "t" {
		return 0, fmt.Errorf("the balances of accounts, branches, tellers and history differ: %q: %w", sums, errors.Join(err))
	}
	counts, err := p.query(ctx, "postgres", `SELECT count(*) || ' ' || coalesce(max(n), 0) FROM markers`)
	if err != nil {
		return 0, err
	}
	var n int64
	if _, err := fmt.Sscan(counts, &n, &row); err != nil || n != row {
		return 0, fmt.Errorf("markers (number and highest): %q: some are missing: %w", counts, errors.Join(err))
	}
	return row, nil
}
