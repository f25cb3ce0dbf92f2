package quiesce

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"farside/internal/dr"
)

// ownSession keeps what a terminal or a service manager sends to the agent's process
// group away from the watchdog.
func ownSession() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

// firstFile is the descriptor of the first file system.
const firstFile = 3

// RunWatchdog is the watchdog: it thaws the file systems of which it inherited
// directories when their time is up or the agent that started it dies. It ends when
// the agent tells it to, or after having thawed. Errors wrap dr.ErrInvalid if it was
// not started by an agent.
func RunWatchdog() error {
	if os.Getenv("FARSIDE_WATCHDOG") == "" {
		return fmt.Errorf("run watchdog: only an agent starts it: %w", dr.ErrInvalid)
	}
	// What ends the agent must not end who thaws behind it.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGPIPE, unix.SIGQUIT)
	w := &watchdog{thaw: func(i int) error { return ioctl(uintptr(firstFile+i), fiThaw) }, files: inherited()}
	if err := lockMemory(); err != nil {
		return fmt.Errorf("run watchdog: lock memory: %w", err)
	}
	// The last to be chosen when memory is short. Not being allowed to say so is no reason to give up.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	w.rehearse()
	orders := make(chan record)
	go listen(os.Stdin, orders)
	return w.run(orders, os.Stdout)
}

// lockMemory keeps what the process touches in memory. Nothing is read in ahead of
// time: the address space of a Go program is mostly empty.
func lockMemory() error {
	return unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
}

// inherited counts the directories and files from firstFile on.
func inherited() int {
	n := 0
	for ; n < maxFiles; n++ {
		var st unix.Stat_t
		if unix.Fstat(firstFile+n, &st) != nil || !plain(st.Mode) {
			break
		}
		unix.CloseOnExec(firstFile + n)
	}
	return n
}

// maxFiles bounds how many file systems can be frozen at a time.
const maxFiles = 1 << 10

// listen passes orders on until there are no more: the agent closed its end, or died.
func listen(from io.Reader, orders chan<- record) {
	defer close(orders)
	for {
		b := make([]byte, recordSize)
		if _, err := io.ReadFull(from, b); err != nil {
			return
		}
		if r, err := parseRecord(b); err == nil {
			orders <- r
		}
	}
}

// watchdog is what the watchdog knows.
type watchdog struct {
	thaw  func(i int) error
	files int
	risky map[int]bool // may be frozen
}

// rehearse goes the way of a thaw once, with a descriptor that can't be thawed, so
// that its code is in memory.
func (w *watchdog) rehearse() {
	w.risky = map[int]bool{1 - firstFile: true} // standard output: a pipe
	w.thawAll()
	w.risky = make(map[int]bool)
	runtime.GC()
}

// thawAgain is the pause between two attempts to thaw.
const thawAgain = 10 * time.Millisecond

// run follows orders until the agent is done or gone.
func (w *watchdog) run(orders <-chan record, answers io.Writer) error {
	say := func(what byte) error {
		_, err := answers.Write(record{what: what}.bytes())
		return err
	}
	if err := say(recReady); err != nil {
		return err
	}
	var due <-chan time.Time
	for {
		select {
		case r, ok := <-orders:
			switch {
			case !ok:
				// The agent's threads have ended, so no freeze is on its way any more.
				w.thawAll()
				return nil
			case r.what == recDone:
				return nil
			case r.what == recArm:
				due = time.After(r.after)
				if err := say(recArmed); err != nil {
					return err
				}
			}
			w.note(r)
		case <-due:
			if w.thawAll() {
				return nil
			}
			due = time.After(thawAgain)
		}
	}
}

func (w *watchdog) note(r record) {
	switch {
	case int(r.index) >= w.files:
	case r.what == recFreezing:
		w.risky[int(r.index)] = true
	case r.what == recThawed:
		delete(w.risky, int(r.index))
	}
}

// thawAll thaws what may be frozen, side by side, and reports whether nothing is left. What is not
// frozen may be about to be: it stays risky.
func (w *watchdog) thawAll() bool {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var thawed []int
	for i := range w.risky {
		wg.Go(func() {
			if w.thaw(i) == nil {
				mu.Lock()
				defer mu.Unlock()
				thawed = append(thawed, i)
			}
		})
	}
	wg.Wait()
	for _, i := range thawed {
		delete(w.risky, i)
	}
	return len(w.risky) == 0
}
