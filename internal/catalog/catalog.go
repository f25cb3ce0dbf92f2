package catalog

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/pressly/goose/v3"
	_ "modernc.org/sqlite" // the driver "sqlite"

	"farside/internal/dr"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Catalog is an open database.
type Catalog struct {
	// Three ways to the same file: durable writes, writes that may be lost in a
	// power cut, reads.
	write, soft, read *sql.DB
	writing           sync.Mutex // SQLite takes one writer; waiting here is fair and not bounded by a time-out
}

// readers is how many transactions may read at a time.
const readers = 4

// Open opens the database file, makes it if need be, and migrates it to the
// schema of this program. The error wraps dr.ErrVersion if the schema is newer, and
// dr.ErrCorrupt if the file is no database.
func Open(ctx context.Context, name string) (*Catalog, error) {
	if err := create(name); err != nil {
		return nil, err
	}
	c := &Catalog{}
	var errs [3]error
	c.write, errs[0] = openFile(name, 1, "immediate", "journal_mode(WAL)", "synchronous(FULL)")
	c.soft, errs[1] = openFile(name, 1, "immediate", "synchronous(NORMAL)")
	c.read, errs[2] = openFile(name, readers, "deferred", "query_only(1)")
	err := errors.Join(errs[:]...)
	if err == nil {
		err = migrate(ctx, c.write)
	}
	if err != nil {
		return nil, fmt.Errorf("open catalog %s: %w", name, errors.Join(kindOf(err), c.Close()))
	}
	return c, nil
}

// create makes an empty file that only its owner may read, if there is none.
func create(name string) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return fmt.Errorf("create catalog: %w", err)
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("create catalog: %w", err)
	}
	return f.Close()
}

func openFile(name string, conns int, lock string, pragmas ...string) (*sql.DB, error) {
	abs, err := filepath.Abs(name)
	if err != nil {
		return nil, err
	}
	q := url.Values{"_txlock": {lock}, "_pragma": append([]string{"busy_timeout(10000)", "foreign_keys(1)"}, pragmas...)}
	u := url.URL{Scheme: "file", Path: filepath.ToSlash(abs)}
	db, err := sql.Open("sqlite", u.String()+"?"+q.Encode())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	return db, nil
}

func migrate(ctx context.Context, db *sql.DB) error {
	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, db, dir)
	if err != nil {
		return fmt.Errorf("read migrations: %w", err)
	}
	have, err := p.GetDBVersion(ctx)
	if err != nil {
		return fmt.Errorf("read schema version: %w", err)
	}
	sources := p.ListSources()
	if newest := sources[len(sources)-1].Version; have > newest {
		return fmt.Errorf("schema is of version %d, this program knows %d: %w", have, newest, dr.ErrVersion)
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("migrate schema: %w", err)
	}
	return nil
}

// kindOf marks SQLite's errors about broken files.
func kindOf(err error) error {
	if s := err.Error(); strings.Contains(s, "not a database") || strings.Contains(s, "malformed") {
		return fmt.Errorf("%w: %w", dr.ErrCorrupt, err)
	}
	return err
}

// Close closes the database. No transaction may run.
func (c *Catalog) Close() error {
	var errs []error
	for _, db := range []*sql.DB{c.read, c.soft, c.write} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	return errors.Join(errs...)
}

// Write runs fn in a transaction, which is durable when Write returns nil, and
// has no effect when fn or Write returns an error.
func (c *Catalog) Write(ctx context.Context, fn func(*Tx) error) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	return run(ctx, c.write, fn)
}

// Note is Write for what will be told again: the transaction may be lost in a
// power cut, and costs no disk flush.
func (c *Catalog) Note(ctx context.Context, fn func(*Tx) error) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	return run(ctx, c.soft, fn)
}

// Read runs fn in a transaction that sees one state of the database and can't change it.
func (c *Catalog) Read(ctx context.Context, fn func(*Tx) error) error {
	return run(ctx, c.read, fn)
}

func run(ctx context.Context, db *sql.DB, fn func(*Tx) error) (err error) {
	sqlTx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("begin transaction: %w", err)
	}
	defer func() { _ = sqlTx.Rollback() }() // without effect after Commit
	if err := fn(&Tx{ctx: ctx, tx: sqlTx}); err != nil {
		return err
	}
	if err := sqlTx.Commit(); err != nil {
		return fmt.Errorf("commit transaction: %w", err)
	}
	return nil
}

// Tx is a transaction. It ends when the function that it was given to returns.
type Tx struct {
	ctx context.Context // of the whole transaction
	tx  *sql.Tx
}

// exec runs a statement and returns how many rows it touched.
func (t *Tx) exec(statement string, args ...any) (int64, error) {
	r, err := t.tx.ExecContext(t.ctx, statement, args...)
	if err != nil {
		return 0, explain(err)
	}
	return r.RowsAffected()
}

// change runs a statement that must touch exactly one row.
func (t *Tx) change(what, statement string, args ...any) error {
	n, err := t.exec(statement, args...)
	if err == nil && n != 1 {
		err = dr.ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// explain marks errors on which callers act.
func explain(err error) error {
	if strings.Contains(err.Error(), "UNIQUE constraint failed") {
		return fmt.Errorf("%w: %w", dr.ErrExists, err)
	}
	return err
}

// scanner is a row to read columns from.
type scanner interface{ Scan(columns ...any) error }

// list runs a query and reads each row with scan.
func list[T any](t *Tx, what string, scan func(scanner) (T, error), query string, args ...any) ([]T, error) {
	rows, err := t.tx.QueryContext(t.ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", what, err)
	}
	defer rows.Close()
	var all []T
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", what, err)
		}
		all = append(all, v)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("list %s: %w", what, err)
	}
	return all, nil
}

// one runs a query for one row; the error wraps dr.ErrNotFound if there is none.
func one[T any](t *Tx, what string, scan func(scanner) (T, error), query string, args ...any) (T, error) {
	v, err := scan(t.tx.QueryRowContext(t.ctx, query, args...))
	if errors.Is(err, sql.ErrNoRows) {
		return v, fmt.Errorf("%s: %w", what, dr.ErrNotFound)
	}
	if err != nil {
		return v, fmt.Errorf("find %s: %w", what, err)
	}
	return v, nil
}
