package agent

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// patientLog is a slog.Handler that never makes who logs wait: a goroutine of its own hands
// the records to another handler. Where the log ends up may lie on a file system
// that is frozen, or full, or on a disk that hangs; the agent must go on. What doesn't
// fit is counted, and the count is logged when there is room again.
type patientLog struct {
	slog.Handler
	queue *logQueue
}

type logQueue struct {
	records chan logged
	dropped atomic.Int64
	close   sync.Once
	done    chan struct{}
	end     chan struct{}
}

// logged is a record and the handler that it is for.
type logged struct {
	slog.Handler
	slog.Record
}

const (
	maxLogged = 1024 // records that wait
	// logGrace bounds how long the end waits for what is still to be written.
	logGrace = time.Second
)

// newPatientLog returns a log that writes through l, and a function that ends it.
func newPatientLog(l *slog.Logger) (*slog.Logger, func()) {
	q := &logQueue{records: make(chan logged, maxLogged), done: make(chan struct{}), end: make(chan struct{})}
	go q.run(l.Handler())
	return slog.New(&patientLog{l.Handler(), q}), q.stop
}

// Handle implements slog.Handler. It drops the record if too many wait.
func (p *patientLog) Handle(_ context.Context, r slog.Record) error {
	select {
	case p.queue.records <- logged{p.Handler, r.Clone()}:
	default:
		p.queue.dropped.Add(1)
	}
	return nil
}

// WithAttrs implements slog.Handler.
func (p *patientLog) WithAttrs(a []slog.Attr) slog.Handler {
	return &patientLog{p.Handler.WithAttrs(a), p.queue}
}

// WithGroup implements slog.Handler.
func (p *patientLog) WithGroup(name string) slog.Handler {
	return &patientLog{p.Handler.WithGroup(name), p.queue}
}

func (q *logQueue) run(h slog.Handler) {
	defer close(q.done)
	for {
		select {
		case r := <-q.records:
			q.write(h, r)
		case <-q.end:
			for {
				select {
				case r := <-q.records:
					q.write(h, r)
				default:
					return
				}
			}
		}
	}
}

func (q *logQueue) write(h slog.Handler, r logged) {
	ctx := context.Background()
	_ = r.Handler.Handle(ctx, r.Record) // there is nobody to tell
	if n := q.dropped.Swap(0); n > 0 {
		lost := slog.NewRecord(time.Now(), slog.LevelWarn, "log records were dropped, since the log could not be written", 0)
		lost.Add("records", n)
		_ = h.Handle(ctx, lost)
	}
}

// stop writes what waits, as far as that works soon. What is logged later is lost.
func (q *logQueue) stop() {
	q.close.Do(func() { close(q.end) })
	select {
	case <-q.done:
	case <-time.After(logGrace):
	}
}
