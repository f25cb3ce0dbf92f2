package demo

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"farside/internal/nbd"
)

// records is the scene with a disk of records behind a tap: the load writes as an NBD client of the agent. It
// needs no rights.
type records struct {
	dir   string
	bytes int64
	rate  int
	tap   string // NBD URI of the agent's tap
	log   *oracle
	stop  context.CancelFunc
	done  sync.WaitGroup

	mu struct {
		sync.Mutex // held by the load for each record, so that holding it freezes the load
		err        error
		ended      bool
	}
}

// errEnded: the load ended without an error, since its disk is full or it was told to.
var errEnded = errors.New("nothing left to do")

// newRecords makes the disk, a sparse file in the work directory. The tap will listen at the URI.
func newRecords(dir string, size int64, rate int, tap string) (scene, error) {
	log, err := openOracle(filepath.Join(dir, "commits.log"))
	if err != nil {
		return nil, err
	}
	s := &records{dir: dir, bytes: size, rate: rate, tap: tap, log: log, stop: func() {}}
	f, err := os.Create(s.path())
	if err != nil {
		return nil, fmt.Errorf("make the disk: %w", errors.Join(err, log.Close()))
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return nil, fmt.Errorf("make the disk: %w", errors.Join(err, log.Close()))
	}
	return s, nil
}

func (s *records) path() string     { return filepath.Join(s.dir, "disk.img") }
func (s *records) live() bool       { return false }
func (s *records) commits() *oracle { return s.log }

func (s *records) running() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.ended {
		return fmt.Errorf("the load has ended: %w", s.mu.err)
	}
	return nil
}

func (s *records) begin(ctx context.Context) error {
	disk, err := nbd.Dial(ctx, s.tap, nil)
	if err != nil {
		return fmt.Errorf("start the load: %w", err)
	}
	log, err := os.OpenFile(filepath.Join(s.dir, "commits.log"), os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("start the load: %w", errors.Join(err, disk.Close()))
	}
	loadCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = cancel
	s.done.Go(func() {
		err := loadRecords(loadCtx, pausable{disk, s}, s.bytes, s.rate, log)
		err = errors.Join(err, disk.Close(), log.Close())
		s.mu.Lock()
		defer s.mu.Unlock()
		s.mu.err, s.mu.ended = cmp.Or(err, errEnded), true
	})
	return nil
}

// pausable lets frozen stop the load between a write and its flush or before the next.
type pausable struct {
	disk *nbd.Client
	s    *records
}

func (p pausable) WriteAt(b []byte, off int64) (int, error) {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	return p.disk.WriteAt(b, off)
}

func (p pausable) Flush() error {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	return p.disk.Flush()
}

func (s *records) frozen(ctx context.Context, fn func(context.Context, io.ReaderAt) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, err := os.Open(s.path())
	if err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	defer f.Close()
	return fn(ctx, f)
}

// disaster writes noise over the disk through another connection to the tap, as a program gone wild would.
func (s *records) disaster(ctx context.Context) (string, error) {
	disk, err := nbd.Dial(ctx, s.tap, nil)
	if err != nil {
		return "", fmt.Errorf("overwrite the disk: %w", err)
	}
	defer disk.Close()
	noise := rand.NewChaCha8([32]byte{})
	buf := make([]byte, 1<<20)
	for off := int64(0); off < s.bytes; off += int64(len(buf)) {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		noise.Read(buf)
		if _, err := disk.WriteAt(buf[:min(int64(len(buf)), s.bytes-off)], off); err != nil {
			return "", fmt.Errorf("overwrite the disk: %w", err)
		}
	}
	if err := disk.Flush(); err != nil {
		return "", fmt.Errorf("overwrite the disk: %w", err)
	}
	return "the load goes on writing into the garbage", nil
}

func (s *records) judge(_ context.Context, image string) (j judgement, err error) {
	f, err := os.Open(image)
	if err != nil {
		return j, fmt.Errorf("judge the disk: %w", err)
	}
	defer f.Close()
	j.Fsck = "skipped"
	first := make([]byte, recordSize)
	if _, err := f.ReadAt(first, 0); err != nil {
		return j, fmt.Errorf("judge the disk: %w", err)
	}
	j.Opened = time.Now()
	if j.verdict, err = checkRecords(f, s.bytes); err != nil {
		return j, err
	}
	j.Read = j.Rows * recordSize
	sum, err := sumRecords(f, j.Rows)
	j.Sums = map[string]string{"disk": hex.EncodeToString(sum[:])}
	return j, err
}

func (s *records) close() error {
	s.stop()
	s.done.Wait()
	return s.log.Close()
}
