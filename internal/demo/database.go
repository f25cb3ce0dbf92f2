package demo

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"time"

	_ "modernc.org/sqlite" // the driver "sqlite"

	"farside/internal/dr"
)

// databaseName is the file of the database on the protected disk.
const databaseName = "bank.db"

// openDatabase opens the SQLite database in dir, in WAL mode and with an fsync in each commit.
func openDatabase(dir string) (*sql.DB, error) {
	pragmas := url.Values{"_pragma": {"journal_mode(WAL)", "synchronous(FULL)", "busy_timeout(5000)"}}
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, databaseName)+"?"+pragmas.Encode())
	if err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	db.SetMaxOpenConns(1)
	return db, nil
}

// LoadOptions say what the load does; it runs in a process of its own, since a disk that is overwritten below a
// mapped file ends the process.
type LoadOptions struct {
	Dir  string // where the database lies: the mounted protected disk
	Log  string // the log of commits, on another disk
	Rate int    // commits a second; 0: as many as go
}

// Load commits numbered, time-stamped rows, each fsynced, and logs each after it has returned, until stop ends
// (or ctx, or an error: the disaster).
func Load(ctx context.Context, opt LoadOptions, stop io.Reader) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	stopped := make(chan struct{})
	go func() { // ends with the process at the latest: the reader is its standard input
		_, _ = io.Copy(io.Discard, stop)
		close(stopped)
		cancel()
	}()
	db, err := openDatabase(opt.Dir)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(opt.Log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open the log of commits: %w", err)
	}
	defer func() { err = errors.Join(err, db.Close(), log.Close()) }()
	if _, err := db.ExecContext(ctx, `CREATE TABLE IF NOT EXISTS entry (n INTEGER PRIMARY KEY, at INTEGER NOT NULL, content BLOB NOT NULL)`); err != nil {
		return fmt.Errorf("make table: %w", err)
	}
	pace := newPace(opt.Rate)
	for n := int64(1); pace.wait(ctx); n++ {
		begin := time.Now().UnixNano()
		// Without ctx: a commit whose answer is not known has no place in the log.
		if _, err := db.ExecContext(context.WithoutCancel(ctx), `INSERT INTO entry VALUES (?, ?, ?)`, n, begin, content(n)); err != nil {
			return fmt.Errorf("commit %d: %w", n, err)
		}
		if err := appendCommit(log, commit{N: n, Begin: begin, End: time.Now().UnixNano()}); err != nil {
			return err
		}
	}
	select {
	case <-stopped:
		return nil
	default:
		return ctx.Err()
	}
}

// pace lets a loop run so many times a second.
type pace struct {
	every time.Duration
	next  time.Time
}

func newPace(rate int) *pace {
	p := &pace{next: time.Now()}
	if rate > 0 {
		p.every = time.Second / time.Duration(rate)
	}
	return p
}

// wait returns when the next round is due, false when ctx is done. A loop that fell behind doesn't catch up.
func (p *pace) wait(ctx context.Context) bool {
	now := time.Now()
	if d := p.next.Sub(now); d > 0 {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(d):
		}
		p.next = p.next.Add(p.every)
	} else {
		p.next = now.Add(p.every)
	}
	return ctx.Err() == nil
}

// verdict is what the check of a recovered database says.
type verdict struct {
	Rows int64  // rows 1 to Rows are there, whole
	OK   bool   // the engine's own check passed and nothing is wrong with the rows
	What string // what is wrong, if anything
}

// checkDatabase proves a recovered database: the engine's integrity check, and every row from the first to the
// last, without gaps, with the content that belongs to its number.
func checkDatabase(ctx context.Context, db *sql.DB) (verdict, error) {
	var answer string
	if err := db.QueryRowContext(ctx, `PRAGMA integrity_check`).Scan(&answer); err != nil {
		return verdict{What: err.Error()}, ctx.Err()
	}
	if answer != "ok" {
		return verdict{What: answer}, nil
	}
	return checkRows(ctx, db)
}

func checkRows(ctx context.Context, db *sql.DB) (v verdict, err error) {
	rows, err := db.QueryContext(ctx, `SELECT n, content FROM entry ORDER BY n`)
	if err != nil {
		return verdict{What: err.Error()}, ctx.Err()
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var n int64
		var got []byte
		if err := rows.Scan(&n, &got); err != nil {
			return v, fmt.Errorf("read row %d: %w: %w", v.Rows+1, err, dr.ErrCorrupt)
		}
		switch {
		case n != v.Rows+1:
			v.What = fmt.Sprintf("row %d is missing", v.Rows+1)
			return v, nil
		case !bytes.Equal(got, content(n)):
			v.What = fmt.Sprintf("row %d has another content", n)
			return v, nil
		}
		v.Rows = n
	}
	if err := rows.Err(); err != nil {
		v.What = err.Error()
		return v, ctx.Err()
	}
	v.OK = true
	return v, nil
}
