package quiesce

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"farside/internal/dr"
)

// Prepare makes everything ready for a freeze that is as short as can be: the file
// systems are found and opened, the watchdog runs, the hooks have run, what was dirty
// is written. Errors wrap ErrNothing, ErrHook, ErrTimeout or dr.ErrUnavailable; then the hooks that come
// after have run already and there is nothing to release.
func Prepare(ctx context.Context, o Options) (*Session, error) {
	vols, err := open(o.Disks)
	// What only a container has mounted vanishes with its last process.
	for try := 0; errors.Is(err, fs.ErrNotExist) && try < 3; try++ {
		vols, err = open(o.Disks)
	}
	if err != nil {
		return nil, err
	}
	args := o.Watchdog
	if args == nil {
		args = []string{WatchdogVerb}
	}
	return prepare(ctx, o, vols, func(files []*os.File) (guard, error) { return startGuard(args, files) })
}

// open finds and opens the file systems on the disks.
func open(disks []string) ([]volume, error) {
	found, err := Find(disks)
	if err != nil {
		return nil, err
	}
	if len(found) > maxFiles {
		return nil, fmt.Errorf("freeze %d file systems: at most %d can be: %w", len(found), maxFiles, dr.ErrUnsupported)
	}
	var vols []volume
	for _, f := range found {
		v, err := openVolume(f)
		if err != nil {
			for _, v := range vols {
				err = errors.Join(err, v.Close())
			}
			return nil, err
		}
		vols = append(vols, v)
	}
	return vols, nil
}
