package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/export"
)

// exportOptions are the arguments of `export`.
type exportOptions struct {
	machine, file string
	disk          uint32
	at, format    string
}

// exported is what `export --json` prints.
type exported struct {
	File     string      `json:"file"`
	Format   string      `json:"format"`
	Machine  string      `json:"machine"`
	Disk     uint32      `json:"disk"`
	Size     int64       `json:"size"`
	Position dr.Position `json:"position"`
	Time     time.Time   `json:"time"`
	From     int64       `json:"from,omitempty"` // continued from this offset
}

// exportState lies beside a raw image that is not complete: which point it is of and how far it is.
type exportState struct {
	Machine  string      `json:"machine"`
	Disk     uint32      `json:"disk"`
	At       string      `json:"at"`
	Position dr.Position `json:"position"`
	Done     int64       `json:"done"`
}

func newExport(a *app) *cobra.Command {
	var o exportOptions
	cmd := &cobra.Command{
		Use:   "export MACHINE FILE",
		Short: "Write a disk as it was at a point into an image file",
		Long: `Export opens a view, copies one disk of it into FILE and closes the view. Until it is complete the
image is called FILE.part; the same command continues a raw image that was interrupted, at the
same point. FILE must not exist.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.machine, o.file = args[0], args[1]
			if err := o.check(); err != nil {
				return err
			}
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				done, err := a.export(ctx, c, &o)
				if err != nil {
					return err
				}
				return a.print(done, func(w io.Writer) {
					fmt.Fprintf(w, "%s: disk %d of %s at %v, %s, %s\n", done.File, done.Disk, done.Machine, done.Position,
						done.Time.Format(time.RFC3339Nano), size(done.Size))
				})
			})
		},
	}
	f := cmd.Flags()
	f.Uint32Var(&o.disk, "disk", 0, "number of the disk (default the only one)")
	f.StringVar(&o.at, "at", "latest", selectorHelp)
	f.StringVar(&o.format, "format", "raw", "raw (sparse) or qcow2")
	return cmd
}

func (o *exportOptions) check() error {
	if o.format != "raw" && o.format != "qcow2" {
		return fmt.Errorf("--format %q: want raw or qcow2: %w", o.format, dr.ErrInvalid)
	}
	if _, err := parseSelector(o.at); err != nil {
		return err
	}
	if _, err := os.Lstat(o.file); err == nil {
		return fmt.Errorf("export to %s: %w", o.file, dr.ErrExists)
	}
	return nil
}

func (o *exportOptions) part() string      { return o.file + ".part" }
func (o *exportOptions) stateFile() string { return o.file + ".part.json" }

// export opens the view, copies, and closes the view whatever happened.
func (a *app) export(ctx context.Context, c *api.Client, o *exportOptions) (done exported, err error) {
	state := o.loadState()
	at, err := parseSelector(o.at)
	if state.Done > 0 {
		at, err = parseSelector(state.Position.String())
	}
	if err != nil {
		return done, err
	}
	r, err := c.OpenView(ctx, &farsidev1.OpenViewRequest{Machine: o.machine, Selector: at, Wait: true, Name: "export"})
	if err != nil {
		return done, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		_, e := c.CloseView(ctx, &farsidev1.CloseViewRequest{View: r.GetView().GetId(), Wait: true})
		err = errors.Join(err, e)
	}()
	status := r.GetView().GetStatus()
	e, err := o.choose(status)
	if err != nil {
		return done, err
	}
	state = exportState{Machine: o.machine, Disk: o.disk, At: o.at, Position: position(status.GetPosition()), Done: state.Done}
	done = exported{
		File: o.file, Format: o.format, Machine: o.machine, Disk: e.GetDiskId(), Size: e.GetSize(),
		Position: state.Position, Time: utc(status.GetTimeNs()), From: state.Done,
	}
	disk, err := dialExport(ctx, c, e.GetUris())
	if err != nil {
		return done, err
	}
	defer disk.Close()
	return done, a.copyImage(ctx, o, disk, &state)
}

// choose returns the export of the wanted disk.
func (o *exportOptions) choose(s *farsidev1.ViewStatus) (*farsidev1.Export, error) {
	if s.GetState() != farsidev1.ViewState_VIEW_STATE_OPEN {
		return nil, fmt.Errorf("the view is %s: %s: %w", lowerName(s.GetState(), "VIEW_STATE_"), s.GetError(), dr.ErrUnavailable)
	}
	list := s.GetExports()
	if o.disk == 0 && len(list) == 1 {
		return list[0], nil
	}
	for _, e := range list {
		if e.GetDiskId() == o.disk {
			return e, nil
		}
	}
	if o.disk == 0 {
		return nil, usage{fmt.Errorf("--disk is missing: the machine has %d disks", len(list))}
	}
	return nil, fmt.Errorf("disk %d: %w", o.disk, dr.ErrNotFound)
}

// copyImage fills FILE.part and makes it FILE.
func (a *app) copyImage(ctx context.Context, o *exportOptions, disk export.Source, state *exportState) error {
	flags := os.O_RDWR | os.O_CREATE
	if state.Done == 0 {
		flags |= os.O_TRUNC
	}
	f, err := os.OpenFile(o.part(), flags, 0o600)
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	bar := a.newBar("export")
	if o.format == "raw" {
		state.Done, err = export.WriteRaw(ctx, f, disk, state.Done, bar.set)
	} else {
		err = export.WriteQcow2(ctx, f, disk, bar.set)
	}
	bar.end(err == nil)
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(fmt.Errorf("export: %w", err), o.saveState(state))
	}
	if err := os.Rename(o.part(), o.file); err != nil {
		return fmt.Errorf("export: %w", err)
	}
	if err := os.Remove(o.stateFile()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("export: %w", err)
	}
	return nil
}

// loadState returns how far an earlier export of the same came, or nothing.
func (o *exportOptions) loadState() exportState {
	var s exportState
	b, err := os.ReadFile(o.stateFile())
	if err != nil || o.format != "raw" || json.Unmarshal(b, &s) != nil {
		return exportState{}
	}
	if _, err := os.Stat(o.part()); err != nil || s.Machine != o.machine || s.Disk != o.disk || s.At != o.at {
		return exportState{}
	}
	return s
}

// saveState notes how far a raw image came; of a qcow2 image nothing can be kept.
func (o *exportOptions) saveState(s *exportState) error {
	if o.format != "raw" || s.Done == 0 {
		return os.Remove(o.part())
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return os.WriteFile(o.stateFile(), b, 0o600)
}
