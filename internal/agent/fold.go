package agent

import (
	"fmt"

	"farside/internal/frame"
)

// maxFoldRun bounds the frames of one fold, and so the memory of its tables to a
// few megabytes.
const maxFoldRun = 4096

// foldWorth is the share of the data that may be left, at most, for a fold to be
// made: what is lost are all points but the last.
const foldWorth = 0.75

// makeRoom folds what the link has not taken yet, when the outbox has no room for
// another batch: better fewer points than an overflow of the source, which costs a sync.
// It reports whether there is room then.
func (r *replicator) makeRoom() (bool, error) {
	if r.tune.fold && r.out.fold(r.gen, (r.tune.memory-batchRoom)/4, r.tune.codec.Compression()) {
		r.stats.folds++
	}
	bytes, _ := r.out.used()
	return bytes+batchRoom <= r.tune.memory, r.out.broken()
}

// fold merges frames that were never sent since the receiver said where it
// stands, so that every place where the receiver can stand remains. It does nothing until least bytes
// have been put since the last time, lest it goes over the same frames again and again. It needs
// memory for one frame that is made and one that is unpacked, besides the tables.
func (o *outbox) fold(generation int, least int64, c frame.Compression) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mu.start.generation != generation || o.mu.fresh < least || o.mu.err != nil {
		return false
	}
	o.mu.fresh = 0
	run := o.mu.entries[o.mu.sent:]
	x, n := planFold(run)
	if n < 2 {
		return false
	}
	kept, err := mergeRun(x, run[:n], c)
	if err != nil {
		// The run is half gone: nothing of it may be sent.
		o.mu.entries = o.mu.entries[:o.mu.sent]
		o.mu.err = fmt.Errorf("fold frames that wait: %w", err)
		return false
	}
	rest := append(kept, run[n:]...)
	o.mu.entries = append(o.mu.entries[:o.mu.sent:o.mu.sent], rest...)
	o.mu.bytes = 0
	for _, e := range o.mu.entries {
		o.mu.bytes += e.cost()
	}
	o.notifyLocked()
	return true
}

// broken returns why nothing more may be sent, if so.
func (o *outbox) broken() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.mu.err
}

// planFold returns a fold of the first n entries, none if that is not worth it.
func planFold(run []entry) (x *frame.Folding, n int) {
	x = frame.NewFolding()
	data := []int64{0}
	for _, e := range run[:min(len(run), maxFoldRun)] {
		f, err := frame.Parse(e.bytes)
		if err != nil || !x.Add(f) {
			break
		}
		data = append(data, data[len(data)-1]+int64(f.RawLen))
	}
	if x.Frames() < 2 {
		return nil, 0
	}
	n, left := x.Plan()
	if float64(left) > foldWorth*float64(data[n]) {
		return nil, 0
	}
	return x, n
}

// mergeRun merges entries and lets go of each as soon as it is not needed.
func mergeRun(x *frame.Folding, run []entry, c frame.Compression) (out []entry, err error) {
	add := func(b []byte) error {
		if b == nil {
			return nil
		}
		f, err := frame.Parse(b)
		if err == nil {
			out = append(out, entry{b, f.End()})
		}
		return err
	}
	for k := range run {
		var f *frame.Frame
		if x.Needs(k) {
			if f, err = frame.Parse(run[k].bytes); err != nil {
				return nil, err
			}
		}
		b, err := x.Merge(f, c)
		if err == nil {
			err = add(b)
		}
		if err != nil {
			return nil, err
		}
		run[k].bytes = nil
	}
	b, err := x.Finish(c)
	if err == nil {
		err = add(b)
	}
	return out, err
}
