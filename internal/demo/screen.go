package demo

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// screen shows the demo to a person: steps, a bar, a line that is rewritten on a terminal.
type screen struct {
	w        io.Writer
	terminal bool
	step     int
	live     bool // the cursor stands behind a live line
	last     time.Time
}

func newScreen(w io.Writer) *screen {
	s := &screen{w: w}
	if f, ok := w.(*os.File); ok {
		info, err := f.Stat()
		s.terminal = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	return s
}

// title begins a numbered step.
func (s *screen) title(format string, args ...any) {
	s.endLive()
	s.step++
	fmt.Fprintf(s.w, "\n%d. %s\n", s.step, fmt.Sprintf(format, args...))
}

// say writes a line below the step.
func (s *screen) say(format string, args ...any) {
	s.endLive()
	fmt.Fprintf(s.w, "   %s\n", strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", "\n   "))
}

// liveEvery is how often a live line is written where it can't be rewritten.
const liveEvery = 2 * time.Second

// line shows what is now, over what was.
func (s *screen) line(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	switch {
	case s.terminal:
		fmt.Fprintf(s.w, "\r\033[K   %s", text)
		s.live = true
	case time.Since(s.last) >= liveEvery:
		s.last = time.Now()
		fmt.Fprintf(s.w, "   %s\n", text)
	}
}

func (s *screen) endLive() {
	if s.live {
		fmt.Fprintln(s.w)
	}
	s.live = false
}

// bar is a progress bar in bytes.
type bar struct {
	s *screen
	p *mpb.Progress
	b *mpb.Bar
}

func (s *screen) newBar() *bar {
	s.endLive()
	if !s.terminal {
		return &bar{s: s}
	}
	p := mpb.New(mpb.WithOutput(s.w), mpb.WithWidth(50), mpb.WithRefreshRate(100*time.Millisecond))
	b := p.New(0, mpb.BarStyle().Lbound(" ").Rbound(" ").Filler("█").Tip("█").Padding("░"),
		mpb.PrependDecorators(decor.Name("   initial replication ")),
		mpb.AppendDecorators(decor.CountersKibiByte("% .1f of % .1f"), decor.Percentage(decor.WC{W: 6})))
	return &bar{s: s, p: p, b: b}
}

func (b *bar) set(done, total int64) {
	if b.b == nil {
		if total > 0 {
			b.s.line("initial replication %s of %s (%d %%)", inUnits(done), inUnits(total), 100*done/total)
		}
		return
	}
	b.b.SetTotal(total, false)
	b.b.SetCurrent(done)
}

// end completes the bar, or takes it away if the copy was not completed.
func (b *bar) end(complete bool) {
	if b.b == nil {
		return
	}
	if complete {
		b.b.SetTotal(-1, true)
	} else {
		b.b.Abort(false)
	}
	b.p.Wait()
}

// inUnits writes bytes in binary units.
func inUnits(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
}
