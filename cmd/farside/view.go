package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/dr"
)

// viewInfo is a view as --json prints it.
type viewInfo struct {
	ID        string       `json:"id"`
	Name      string       `json:"name,omitempty"`
	Machine   string       `json:"machine"`
	MachineID string       `json:"machine_id"`
	State     string       `json:"state"`
	Error     string       `json:"error,omitempty"`
	Position  *dr.Position `json:"position,omitempty"`
	Time      *time.Time   `json:"time,omitempty"`
	Writable  bool         `json:"writable"`
	OpenMs    float64      `json:"open_ms"`
	Exports   []exportInfo `json:"exports"`
}

type exportInfo struct {
	Disk uint32   `json:"disk"`
	Size int64    `json:"size"`
	URIs []string `json:"uris"`
}

func newView(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "view", Short: "Open a machine's disks as they were at a point, over NBD"}
	cmd.AddCommand(newViewOpen(a), newViewClose(a), newViewList(a))
	return cmd
}

func newViewOpen(a *app) *cobra.Command {
	var at, name string
	var writable bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "open MACHINE",
		Short: "Open a view and print where its disks are served",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			selector, err := parseSelector(at)
			if err != nil {
				return err
			}
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.OpenView(ctx, &farsidev1.OpenViewRequest{
					Machine: args[0], Selector: selector, Writable: writable, Name: name, Wait: true, TimeoutMs: timeout.Milliseconds(),
				})
				if err != nil {
					return err
				}
				v := describeView(r.GetView())
				return a.print(v, v.human)
			})
		},
	}
	cmd.Flags().StringVar(&at, "at", "latest", selectorHelp)
	cmd.Flags().StringVar(&name, "name", "", "name of the view")
	cmd.Flags().BoolVar(&writable, "writable", false, "take writes, into a branch that goes when the view is closed")
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to wait")
	return cmd
}

func newViewClose(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "close VIEW",
		Short: "Close a view and throw away what was written to it",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.CloseView(ctx, &farsidev1.CloseViewRequest{View: args[0], Wait: true})
				if err != nil {
					return err
				}
				v := describeView(r.GetView())
				return a.print(v, func(w io.Writer) { fmt.Fprintf(w, "%s is closed\n", v.ID) })
			})
		},
	}
}

func newViewList(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list [MACHINE]",
		Short: "List the views",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.ListViews(ctx, &farsidev1.ListViewsRequest{Machine: strings.Join(args, "")})
				if err != nil {
					return err
				}
				list := []viewInfo{}
				for _, v := range r.GetViews() {
					list = append(list, describeView(v))
				}
				return a.print(list, func(w io.Writer) {
					for _, v := range list {
						v.human(w)
					}
				})
			})
		},
	}
}

func describeView(v *farsidev1.View) viewInfo {
	s := v.GetStatus()
	info := viewInfo{
		ID: v.GetId(), Name: v.GetName(), Machine: v.GetMachineName(), MachineID: v.GetMachineId(),
		State: lowerName(s.GetState(), "VIEW_STATE_"), Error: s.GetError(), Position: positionOrNil(s.GetPosition()),
		Time: timeOrNil(s.GetTimeNs()), Writable: v.GetWritable(), OpenMs: s.GetOpenMs(), Exports: []exportInfo{},
	}
	for _, e := range s.GetExports() {
		info.Exports = append(info.Exports, exportInfo{Disk: e.GetDiskId(), Size: e.GetSize(), URIs: e.GetUris()})
	}
	return info
}

func (v viewInfo) human(w io.Writer) {
	fmt.Fprintf(w, "view %s of %s: %s", v.ID, v.Machine, v.State)
	if v.Position != nil && v.Time != nil {
		fmt.Fprintf(w, ", at %v, %s", *v.Position, v.Time.Format(time.RFC3339Nano))
	}
	if v.Error != "" {
		fmt.Fprintf(w, ": %s", v.Error)
	}
	fmt.Fprintln(w)
	for _, e := range v.Exports {
		for _, uri := range e.URIs {
			fmt.Fprintf(w, "  disk %d  %s  %s\n", e.Disk, size(e.Size), uri)
		}
	}
}
