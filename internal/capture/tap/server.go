package tap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"sync"

	"farside/internal/capture"
	"farside/internal/dr"
	"farside/internal/nbd"
)

// Options say what Open puts together.
type Options struct {
	// Disks to capture: id and path of a file or block device each. Sizes are
	// found, not given.
	Disks []capture.Disk
	// ExportNames are the names under which writers find the disks. A disk
	// without one is found by its id, and an only disk by "" too.
	ExportNames map[dr.DiskID]string
	// Listen accepts the writers.
	Listen net.Listener
	// Queue bounds the changes that wait for the consumer, in bytes; zero
	// chooses DefaultQueue.
	Queue int64
	// NBD is for TLS, limits and the log; its Lookup and List are set here.
	NBD nbd.Config
}

// Opened is a Tap with its files and its server, as Open makes it.
type Opened struct {
	*Tap
	server *nbd.Server
	files  []*File
	served chan error // what Serve returned
	once   sync.Once  // Close
	err    error
}

// Open opens the files of disks, and serves them to writers on the listener,
// which it owns from then on, until Close.
func Open(o Options) (_ *Opened, err error) {
	t := &Opened{served: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.closeFiles(), o.Listen.Close())
		}
	}()
	var disks []Disk
	for _, d := range o.Disks {
		f, err := OpenFile(d.Path)
		if err != nil {
			return nil, fmt.Errorf("open tapped disk %d: %w", d.ID, err)
		}
		t.files = append(t.files, f)
		disks = append(disks, Disk{ID: d.ID, Path: d.Path, Backing: f})
	}
	if t.Tap, err = New(disks, o.Queue, nil); err != nil {
		return nil, err
	}
	conf := o.NBD
	conf.Lookup, conf.List = t.named(o.ExportNames)
	if t.server, err = nbd.NewServer(conf); err != nil {
		return nil, err
	}
	go func() { t.served <- t.server.Serve(o.Listen) }() // Close waits for it
	return t, nil
}

// Close lets the writers' requests in flight finish, ends their connections,
// flushes and closes everything.
func (t *Opened) Close() error {
	t.once.Do(func() {
		err := t.server.Shutdown(context.Background())
		if e := <-t.served; !errors.Is(e, nbd.ErrServerClosed) {
			err = errors.Join(err, e)
		}
		t.err = errors.Join(err, t.Tap.Close(), t.closeFiles())
	})
	return t.err
}

func (t *Opened) closeFiles() (err error) {
	for _, f := range t.files {
		err = errors.Join(err, f.Flush(), f.Close())
	}
	return err
}

// named returns Lookup and Names with some of the disks under other names.
func (t *Tap) named(names map[dr.DiskID]string) (lookup func(string) (*nbd.Export, error), list func() []string) {
	lookup = func(name string) (*nbd.Export, error) {
		for id, n := range names {
			if n == name {
				return t.Lookup(strconv.Itoa(int(id)))
			}
		}
		return t.Lookup(name)
	}
	list = func() []string {
		out := t.Names()
		for i, d := range t.disks {
			if n := names[d.ID]; n != "" {
				out[i] = n
			}
		}
		return out
	}
	return lookup, list
}

// Lookup finds the export of a disk, for an nbd.Config.
func (t *Tap) Lookup(name string) (*nbd.Export, error) {
	d := t.devices[0]
	if name != "" || len(t.devices) > 1 {
		id, err := strconv.ParseUint(name, 10, 16)
		if err != nil || t.find(dr.DiskID(id)) == nil {
			return nil, nbd.ErrUnknownExport
		}
		d = t.find(dr.DiskID(id))
	}
	return &nbd.Export{
		Device:      d,
		MinBlock:    dr.SectorSize,
		Description: filepath.Base(t.disks[d.index].Path),
	}, nil
}

// Names lists the exports, for an nbd.Config.
func (t *Tap) Names() (names []string) {
	for _, d := range t.disks {
		names = append(names, strconv.Itoa(int(d.ID)))
	}
	return names
}
