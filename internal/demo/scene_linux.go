package demo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"farside/internal/demo/stage"

	"golang.org/x/sys/unix"
)

// freezeLimit bounds how long the demo's file system stays frozen.
const freezeLimit = 20 * time.Second

// database is the scene with a SQLite database on ext4 on a loop device.
type database struct {
	dir    string // the work directory
	rate   int
	device *device
	load   *stage.Process
	stdin  io.Closer // the load ends when it is closed
	log    *oracle
}

// newDatabase makes the disk in the work directory.
func newDatabase(ctx context.Context, dir string, size int64, rate int) (scene, error) {
	log, err := openOracle(filepath.Join(dir, "commits.log"))
	if err != nil {
		return nil, err
	}
	d, err := newDevice(ctx, filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk"), size)
	if err != nil {
		return nil, errors.Join(err, log.Close())
	}
	s := &database{dir: dir, rate: rate, device: d, log: log}
	if err := writeArchive(filepath.Join(d.dir, "archive"), size/4); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// writeArchive puts old data beside the database, so that there is something to copy at first.
func writeArchive(dir string, size int64) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("fill the disk: %w", err)
	}
	f, err := os.Create(filepath.Join(dir, "archive"))
	if err != nil {
		return fmt.Errorf("fill the disk: %w", err)
	}
	_, err = io.CopyN(f, rand.NewChaCha8([32]byte{1}), size)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("fill the disk: %w", err)
	}
	return nil
}

func (s *database) path() string     { return s.device.path }
func (s *database) live() bool       { return true }
func (s *database) commits() *oracle { return s.log }
func (s *database) running() error   { return s.load.Ended() }

func (s *database) begin(context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("start the load: %w", err)
	}
	cmd := exec.Command(self, "demo", "load", "--rate", strconv.Itoa(s.rate), s.device.dir, filepath.Join(s.dir, "commits.log"))
	if s.stdin, err = cmd.StdinPipe(); err != nil {
		return fmt.Errorf("start the load: %w", err)
	}
	s.load, err = stage.Start("load", filepath.Join(s.dir, "load.log"), cmd)
	return err
}

func (s *database) frozen(ctx context.Context, fn func(context.Context, io.ReaderAt) error) error {
	f, err := s.device.openDirect(os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	return s.device.frozen(ctx, freezeLimit, func(ctx context.Context) error { return fn(ctx, direct{f}) })
}

// direct reads through a buffer that direct I/O accepts.
type direct struct{ f *os.File }

func (d direct) ReadAt(p []byte, off int64) (int, error) {
	buf, err := alignedBuffer(len(p))
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Munmap(buf) }()
	n, err := d.f.ReadAt(buf, off)
	copy(p, buf[:n])
	return n, err
}

func (s *database) disaster(ctx context.Context) (what string, err error) {
	if err := s.device.overwrite(ctx); err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, s.device.abandon()) }()
	select { // the database notices sooner or later, or not at all while it reads from memory
	case <-s.load.Done():
		return "the database died of it: " + stage.LastLines(filepath.Join(s.dir, "load.log"), 1), nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	case <-time.After(500 * time.Millisecond):
	}
	return "the database goes on from memory", nil
}

// judge mounts a copy of the recovered disk, which replays the journal of the file system, opens and proves the
// database, sums the files as a guest will, and has the file system checked.
func (s *database) judge(ctx context.Context, image string) (j judgement, err error) {
	d, err := attach(image)
	if err != nil {
		return j, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	dir := filepath.Join(s.dir, "recovered")
	if err := d.mount(dir); err != nil {
		return judgement{Fsck: err.Error(), verdict: verdict{What: "not reachable"}}, nil //nolint:nilerr // a judgement
	}
	if err := j.prove(ctx, dir); err != nil {
		return j, err
	}
	if err := d.unmount(); err != nil {
		return j, err
	}
	clean, what := d.fsck(ctx)
	if j.Fsck = "clean"; !clean {
		j.Fsck = what
	}
	return j, nil
}

// prove opens the database in dir and checks it. The sums are taken while it is open but before anything is
// written: closing it would fold its log into it, and a guest reads it as it came.
func (j *judgement) prove(ctx context.Context, dir string) (err error) {
	db, err := openDatabase(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	var tables int64
	if err := db.QueryRowContext(ctx, `SELECT count(*) FROM sqlite_master`).Scan(&tables); err != nil || tables == 0 {
		j.What = fmt.Sprintf("%d tables, %v", tables, err)
		return ctx.Err()
	}
	j.Opened = time.Now()
	if j.Sums, err = sumFiles(dir); err != nil {
		return err
	}
	j.verdict, err = checkDatabase(ctx, db)
	return err
}

// sumFiles returns the SHA-256 of each file in the root of a mounted file system.
func sumFiles(dir string) (map[string]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("sum files: %w", err)
	}
	list := map[string]string{}
	for _, e := range entries {
		if !e.Type().IsRegular() || strings.HasSuffix(e.Name(), "-shm") { // -shm is written by opening
			continue
		}
		f, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("sum files: %w", err)
		}
		h := sha256.New()
		_, err = io.Copy(h, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, fmt.Errorf("sum files: %w", err)
		}
		list[e.Name()] = hex.EncodeToString(h.Sum(nil))
	}
	return list, nil
}

func (s *database) close() error {
	var err error
	if s.load != nil {
		_ = s.stdin.Close() // it may have ended already
		err = s.load.Stop()
	}
	return errors.Join(err, s.device.Close(), s.log.Close())
}
