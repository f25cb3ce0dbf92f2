package load

import (
	"context"
	"database/sql"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	_ "modernc.org/sqlite" // the driver "sqlite"
)

const (
	fileSize = 8 << 20
	page     = 4096
)

// recorder is told of each commit once it is durable; an Oracle is one.
type recorder interface {
	Record(row int64, at time.Time)
}

// Mixed loads the file system mounted at dir until ctx ends; every worker then
// stops after its current operation. The first error other than ctx's ends
// all.
func Mixed(ctx context.Context, dir string, seed uint64, o recorder) error {
	if err := Prepare(ctx, dir); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for i, w := range []func(context.Context, string, *rand.Rand) error{direct, buffered, sequential, mapped, directories, trim} {
		g.Go(func() error { return w(ctx, dir, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	g.Go(func() error { return Database(ctx, dir, o) })
	return g.Wait()
}

// Prepare makes the files that the workers need, so that the database is there
// from the first recovered point on.
func Prepare(ctx context.Context, dir string) error {
	db, err := openDatabase(ctx, dir)
	if err != nil {
		return err
	}
	defer db.Close()
	for _, name := range []string{"direct", "mapped"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, fileSize), 0o600); err != nil {
			return fmt.Errorf("prepare load: %w", err)
		}
	}
	unix.Sync()
	return nil
}

// Database commits numbered, time-stamped rows, each synced, until ctx ends,
// and records each in o after it returned.
func Database(ctx context.Context, dir string, o recorder) error {
	db, err := openDatabase(ctx, dir)
	if err != nil {
		return err
	}
	defer db.Close()
	row := int64(0)
	if err := db.QueryRowContext(ctx, `SELECT coalesce(max(n), 0) FROM commits`).Scan(&row); err != nil {
		return fmt.Errorf("find the last row: %w", err)
	}
	for row++; ctx.Err() == nil; row++ {
		// A commit is never cancelled half-way: the oracle must know how it ended.
		_, err := db.ExecContext(context.WithoutCancel(ctx), `INSERT INTO commits(n, at, filler) VALUES (?, ?, randomblob(700))`, row, time.Now().UnixNano())
		if err != nil {
			return fmt.Errorf("commit row %d: %w", row, err)
		}
		o.Record(row, time.Now())
		if slow > 1 {
			pause(ctx, time.Millisecond)
		}
	}
	return nil
}

func openDatabase(ctx context.Context, dir string) (*sql.DB, error) {
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "load.db")+"?_pragma=journal_mode(wal)&_pragma=synchronous(full)")
	if err != nil {
		return nil, fmt.Errorf("open load database: %w", err)
	}
	db.SetMaxOpenConns(1)
	if _, err := db.ExecContext(ctx, `CREATE TABLE IF NOT EXISTS commits(n INTEGER PRIMARY KEY, at INTEGER, filler BLOB)`); err != nil {
		db.Close()
		return nil, fmt.Errorf("create load table: %w", err)
	}
	return db, nil
}

// CheckDatabase opens the load's database under dir and returns its highest
// row. Damage, or a missing row below the highest, is an error.
func CheckDatabase(ctx context.Context, dir string) (int64, error) {
	db, err := openDatabase(ctx, dir)
	if err != nil {
		return 0, err
	}
	defer db.Close()
	var verdict string
	if err := db.QueryRowContext(ctx, `PRAGMA integrity_check`).Scan(&verdict); err != nil || verdict != "ok" {
		return 0, fmt.Errorf("integrity check: %q: %w", verdict, err)
	}
	var n, highest int64
	if err := db.QueryRowContext(ctx, `SELECT count(*), coalesce(max(n), 0) FROM commits`).Scan(&n, &highest); err != nil {
		return 0, fmt.Errorf("count rows: %w", err)
	}
	if n != highest {
		return 0, fmt.Errorf("%d rows up to number %d: some are missing", n, highest)
	}
	return highest, nil
}

// direct overwrites random pages past the page cache.
func direct(ctx context.Context, dir string, rng *rand.Rand) error {
	fd, err := unix.Open(filepath.Join(dir, "direct"), unix.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return fmt.Errorf("open for direct writes: %w", err)
	}
	defer unix.Close(fd)
	buf := alignedPage()
	for ctx.Err() == nil {
		fill(buf, rng)
		if _, err := unix.Pwrite(fd, buf, page*rng.Int64N(fileSize/page)); err != nil {
			return fmt.Errorf("direct write: %w", err)
		}
		pause(ctx, time.Millisecond)
	}
	return nil
}

// buffered appends to a file and syncs it, starting anew when it is large.
func buffered(ctx context.Context, dir string, rng *rand.Rand) error {
	f, err := os.Create(filepath.Join(dir, "buffered"))
	if err != nil {
		return err
	}
	defer f.Close()
	for n := 0; ctx.Err() == nil; n++ {
		buf := make([]byte, 1+rng.IntN(20_000))
		fill(buf, rng)
		if n%200 == 199 {
			if err := f.Truncate(0); err != nil {
				return err
			}
			if _, err := f.Seek(0, 0); err != nil {
				return err
			}
		}
		if _, err := f.Write(buf); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		pause(ctx, 2*time.Millisecond)
	}
	return nil
}

// sequential writes a file by the megabyte, then replaces it.
func sequential(ctx context.Context, dir string, rng *rand.Rand) error {
	buf := make([]byte, 1<<20)
	for ctx.Err() == nil {
		f, err := os.Create(filepath.Join(dir, "sequential.new"))
		if err != nil {
			return err
		}
		for range 8 {
			fill(buf, rng)
			if _, err := f.Write(buf); err != nil {
				f.Close()
				return err
			}
			pause(ctx, 10*time.Millisecond)
		}
		if err := f.Sync(); err != nil {
			f.Close()
			return err
		}
		f.Close()
		if err := os.Rename(f.Name(), filepath.Join(dir, "sequential")); err != nil {
			return err
		}
	}
	return nil
}

// mapped stores into a memory-mapped file and syncs it now and then.
func mapped(ctx context.Context, dir string, rng *rand.Rand) error {
	f, err := os.OpenFile(filepath.Join(dir, "mapped"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, fileSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map file: %w", err)
	}
	defer unix.Munmap(m)
	for n := 0; ctx.Err() == nil; n++ {
		at := rng.IntN(fileSize - 100)
		fill(m[at:at+100], rng)
		if n%50 == 49 {
			if err := unix.Msync(m, unix.MS_SYNC); err != nil {
				return fmt.Errorf("sync map: %w", err)
			}
		}
		pause(ctx, time.Millisecond/2)
	}
	return nil
}

// directories creates, renames and removes small files.
func directories(ctx context.Context, dir string, rng *rand.Rand) error {
	for n := 0; ctx.Err() == nil; n++ {
		sub := filepath.Join(dir, fmt.Sprintf("d%d", n%7))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			return err
		}
		name := filepath.Join(sub, fmt.Sprintf("f%d", n%100))
		if err := os.WriteFile(name+".tmp", make([]byte, rng.IntN(9000)), 0o600); err != nil {
			return err
		}
		if err := os.Rename(name+".tmp", name); err != nil {
			return err
		}
		if n%10 == 9 {
			if err := os.RemoveAll(sub); err != nil {
				return err
			}
		}
		pause(ctx, 3*time.Millisecond)
	}
	return nil
}

// trim discards the free space of the file system every half second, as far as
// the device can.
func trim(ctx context.Context, dir string, _ *rand.Rand) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	for ctx.Err() == nil {
		pause(ctx, 500*time.Millisecond)
		r := struct{ start, length, minimum uint64 }{length: 1<<64 - 1}
		const fitrim = 0xc0185879
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, d.Fd(), fitrim, uintptr(unsafe.Pointer(&r)))
		if errno != 0 && errno != unix.EOPNOTSUPP {
			return fmt.Errorf("trim: %w", errno)
		}
	}
	return nil
}

// fill writes bytes of which about half can be compressed.
func fill(b []byte, rng *rand.Rand) {
	for i := 0; i+8 <= len(b); i += 16 {
		binary.LittleEndian.PutUint64(b[i:], rng.Uint64())
	}
}

func alignedPage() []byte {
	b := make([]byte, 2*page)
	skip := page - int(uintptr(unsafe.Pointer(&b[0]))%page)
	return b[skip : skip+page]
}

// slow is by how much each pause of the load is longer than usual: for machines that
// can't do more, as emulated ones.
var slow = func() time.Duration {
	n, err := strconv.Atoi(os.Getenv(slowVariable))
	if err != nil || n < 1 {
		return 1
	}
	return time.Duration(n)
}()

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d * slow):
	}
}
