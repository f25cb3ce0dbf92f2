package main

import (
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// bar shows progress in bytes on a terminal, and nothing elsewhere.
type bar struct {
	p *mpb.Progress
	b *mpb.Bar
}

func (a *app) newBar(name string) *bar {
	if !isTerminal(a.err) {
		return &bar{}
	}
	p := mpb.New(mpb.WithOutput(a.err), mpb.WithWidth(60), mpb.WithRefreshRate(150*time.Millisecond))
	return &bar{p: p, b: p.AddBar(0,
		mpb.PrependDecorators(decor.Name(name+" ")),
		mpb.AppendDecorators(decor.CountersKibiByte("% .1f of % .1f"), decor.Percentage(decor.WC{W: 6})))}
}

func (b *bar) set(done, total int64) {
	if b.b != nil {
		b.b.SetTotal(total, false)
		b.b.SetCurrent(done)
	}
}

// end takes the bar to its end, or stops it where it is.
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
