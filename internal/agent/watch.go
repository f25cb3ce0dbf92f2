package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"farside/internal/blockdev"
	"farside/internal/capture"
	"farside/internal/dr"
)

// lookEvery is how often the devices of the machine are looked at.
const lookEvery = time.Second

const (
	// backLooks is how often one after the other a disk that was away must be found again: one that comes and goes
	// would have the capture opened anew all the time.
	backLooks = 2
	// leaveFor is how long a device is left alone that somebody detaches while it is captured.
	leaveFor = 2 * time.Second
	// A disk that could not be opened is tried again after so long, and twice as long each time.
	minReopen = 10 * time.Second
	maxReopen = 10 * time.Minute
)

// asideDisk is a protected disk that is not captured at present.
type asideDisk struct {
	capture.Disk
	code, why string
	since     time.Time
	back      int       // looks that found it, one after the other
	retry     time.Time // not before
	tries     int       // at opening it
}

// devices is what the agent knows of the devices under its disks. The agent's lock guards it.
type devices struct {
	captured []capturedDisk
	known    map[dr.DiskID]blockdev.Device // as they were captured last
	aside    map[dr.DiskID]*asideDisk
	whole    map[dr.DiskID]bool // the copy is a state that the disk was in
	told     map[dr.DiskID]change
	fresh    newDisks
	running  bool // there is a stream that can be asked to end
}

// errDisks ends a stream because a disk was taken out, came back or is another one.
var errDisks = fmt.Errorf("the disks changed: %w", dr.ErrUnavailable)

// forget forgets the disks that w has not.
func (d *devices) forget(w *work) {
	if d.aside == nil {
		d.aside, d.told = make(map[dr.DiskID]*asideDisk), make(map[dr.DiskID]change)
		d.known = make(map[dr.DiskID]blockdev.Device)
	}
	for id := range d.aside {
		if !slices.ContainsFunc(w.disks, func(x capture.Disk) bool { return x.ID == id }) {
			delete(d.aside, id)
		}
	}
}

// setAside notes that a disk can't be captured, and reports whether that is news.
func (d *devices) setAside(p *place, now time.Time) bool {
	x := d.aside[p.ID]
	if x != nil && x.code == p.code {
		x.why, x.back = p.why, 0
		return false
	}
	if x == nil {
		x = &asideDisk{Disk: p.Disk, since: now}
		d.aside[p.ID] = x
	}
	x.code, x.why, x.back = p.code, p.why, 0
	return true
}

// choose returns the disks to capture of those that are somewhere, and what is to be told of the others.
func (d *devices) choose(w *work, places []place, now time.Time) (present []capture.Disk, news []notice) {
	d.forget(w)
	for i := range places {
		p := &places[i]
		x := d.aside[p.ID]
		switch {
		case p.code != "":
			if d.setAside(p, now) {
				news = append(news, notice{p.code, true, p.why + "; it is waited for", now})
			}
		case x != nil && now.Before(x.retry):
		default:
			present = append(present, p.Disk)
		}
	}
	return present, news
}

// opened notes what is captured now.
func (d *devices) opened(m *blockdev.Machine, places []place, disks []capture.Disk) {
	d.captured = nil
	clear(d.told)
	for _, p := range places {
		i := slices.IndexFunc(disks, func(x capture.Disk) bool { return x.ID == p.ID })
		if i < 0 {
			continue
		}
		delete(d.aside, p.ID)
		if p.here == nil {
			continue
		}
		d.captured = append(d.captured, capturedDisk{Disk: p.Disk, was: *p.here, table: m.Table(p.here.Path)})
		d.known[p.ID] = *p.here
	}
}

// unopened notes that a disk that is there can't be opened.
func (d *devices) unopened(disk capture.Disk, err error, now time.Time) {
	d.setAside(&place{Disk: disk, code: diskUnreadable, why: err.Error()}, now)
	x := d.aside[disk.ID]
	x.retry = now.Add(min(minReopen<<min(x.tries, 10), maxReopen))
	x.tries++
}

// look holds the devices against what they were. again says that the capture must be opened anew.
func (d *devices) look(places []place, table func(path string) string, now time.Time) (news []notice, again bool) {
	for i := range places {
		p := &places[i]
		if x := d.aside[p.ID]; x != nil {
			n, back := d.lookAside(x, p, now)
			news, again = append(news, n...), again || back
			continue
		}
		c := d.capturedDisk(p.ID)
		if c == nil {
			continue
		}
		v := changeOf(c, *p, table(c.was.Path))
		if v == d.told[p.ID] {
			continue
		}
		if d.told[p.ID] = v; v.code == "" {
			continue
		}
		news = append(news, notice{v.code, v.warn, v.text, now})
		again = again || v.response != tell
		if v.response == letOff {
			d.setAside(&place{Disk: p.Disk, code: v.code, why: v.text}, now)
			d.aside[p.ID].retry = now.Add(leaveFor)
		}
	}
	return news, again
}

// lookAside looks whether a disk that is away is back.
func (d *devices) lookAside(x *asideDisk, p *place, now time.Time) ([]notice, bool) {
	if p.code != "" {
		if d.setAside(p, now) {
			return []notice{{p.code, true, p.why, now}}, false
		}
		return nil, false
	}
	if x.back++; x.back != backLooks || now.Before(x.retry) {
		x.back = min(x.back, backLooks-1) // looked at again
		return nil, false
	}
	return []notice{{"disk-returned", false, fmt.Sprintf("%s is there again, after %s: it is compared", p.Path, now.Sub(x.since).Round(time.Second)), now}}, true
}

func (d *devices) capturedDisk(id dr.DiskID) *capturedDisk {
	i := slices.IndexFunc(d.captured, func(c capturedDisk) bool { return c.ID == id })
	if i < 0 {
		return nil
	}
	return &d.captured[i]
}

// absent returns the disks of w that are not captured, and why that keeps everything from being a point: the
// copy of one of them is no state that it ever was in.
func (d *devices) absent(w *work, present []capture.Disk) (out []capture.Disk, hold error) {
	var torn []capture.Disk
	for _, x := range w.disks {
		if slices.ContainsFunc(present, func(p capture.Disk) bool { return p.ID == x.ID }) {
			continue
		}
		out = append(out, x)
		if !d.whole[x.ID] {
			torn = append(torn, x)
		}
	}
	if len(torn) > 0 {
		hold = fmt.Errorf("no points are made: the copy of %s is not complete, and the disk is not there. They are made again when it is back, or no longer protected: %w",
			pathsOf(torn), dr.ErrNoPoint)
	}
	return out, hold
}

// watchDevices looks at the machine's devices until ctx ends.
func (a *agent) watchDevices(ctx context.Context, offered func(m *blockdev.Machine) []found) error {
	for ctx.Err() == nil {
		sleep(ctx, lookEvery, nil)
		p, _ := a.assignment()
		w, err := workOf(p, a.memory)
		if err != nil || w == nil {
			continue
		}
		m := a.scan()
		if len(m.Devices) > 0 {
			a.lookAt(w, &m, offered, time.Now())
		}
		a.keepRecord(w)
	}
	return ctx.Err()
}

// lookAt does what a look at the machine asks for.
func (a *agent) lookAt(w *work, m *blockdev.Machine, offered func(m *blockdev.Machine) []found, now time.Time) {
	news, stream := a.looked(w, m, offered, now)
	a.tell(news)
	if stream != nil {
		stream.depart(errDisks)
	}
}

// looked returns what a look at the machine says, and the stream that must end for it, if one must.
func (a *agent) looked(w *work, m *blockdev.Machine, offered func(m *blockdev.Machine) []found, now time.Time) (news []notice, end *stream) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.devices.forget(w)
	places := locate(m, w.disks, w.identities, a.devices.known, a.isBlock)
	if a.devices.running {
		var again bool
		if news, again = a.devices.look(places, m.Table, now); again {
			end = a.mu.stream
		}
	}
	if offered != nil {
		for _, c := range a.devices.fresh.look(offered(m), seqsOf(m), w.protects(places)) {
			news = append(news, notice{c.code, c.warn, c.text, now})
		}
	}
	return news, end
}

func seqsOf(m *blockdev.Machine) map[string]uint64 {
	out := make(map[string]uint64)
	for i := range m.Devices {
		out[m.Devices[i].Path] = m.Devices[i].DiskSeq
	}
	return out
}

// tell makes news known.
func (a *agent) tell(news []notice) {
	for _, n := range news {
		a.notices.add(n)
		a.log.Warn(n.text, "code", n.code)
	}
	if len(news) > 0 {
		a.news()
	}
}

// openPresent opens the capture of the disks that are there. One that can't be opened is set aside, if
// there are others.
func (a *agent) openPresent(w *work, m *blockdev.Machine) (o opened, present []capture.Disk, err error) {
	a.mu.Lock()
	places := locate(m, w.disks, w.identities, a.devices.known, a.isBlock)
	present, news := a.devices.choose(w, places, time.Now())
	a.mu.Unlock()
	a.tell(news)
	if len(present) == 0 {
		return o, nil, a.nonePresent(places)
	}
	for {
		o, err = a.open(present, w.driver, w.ring)
		var bad *capture.DiskError
		if err == nil || len(present) == 1 || !errors.As(err, &bad) || !errors.Is(err, dr.ErrUnavailable) && !errors.Is(err, dr.ErrNotFound) {
			break
		}
		i := slices.IndexFunc(present, func(d capture.Disk) bool { return d.ID == bad.Disk })
		if i < 0 {
			break
		}
		now := time.Now()
		a.mu.Lock()
		a.devices.unopened(present[i], bad.Err, now)
		a.mu.Unlock()
		a.tell([]notice{{diskUnreadable, true, fmt.Sprintf("disk %d can't be opened, the others go on: %v", bad.Disk, bad.Err), now}})
		present = slices.Delete(slices.Clone(present), i, i+1)
	}
	if err != nil {
		return o, nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.devices.opened(m, places, present)
	return o, present, nil
}

// nonePresent says why no disk can be captured.
func (a *agent) nonePresent(places []place) error {
	for _, p := range places {
		if p.code != "" {
			return fmt.Errorf("disk %d: %s: %w", p.ID, p.why, dr.ErrInvalid)
		}
	}
	return fmt.Errorf("no disk can be opened: %w", dr.ErrUnavailable)
}

// setTorn notes which disks' copies are no states that they were in.
func (a *agent) setTorn(torn map[dr.DiskID]bool) {
	a.mu.Lock()
	if a.devices.whole == nil {
		a.devices.whole = make(map[dr.DiskID]bool)
	}
	for id, t := range torn {
		a.devices.whole[id] = !t
	}
	a.mu.Unlock()
}

// torn returns the disks whose copies are no states that they were in.
func (d *devices) torn() map[dr.DiskID]bool {
	out := make(map[dr.DiskID]bool)
	for id, w := range d.whole {
		out[id] = !w
	}
	return out
}

// unwatched notes that there is no stream that could be asked to end.
func (a *agent) unwatched() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.devices.running = false
}
