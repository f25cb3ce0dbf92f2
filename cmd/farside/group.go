package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/dr"
)

func newGroup(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "group", Short: "Machines that are tagged at one instant"}
	cmd.AddCommand(newGroupSet(a), newGroupList(a), newGroupTag(a), newGroupPoints(a), newGroupDelete(a))
	return cmd
}

// groupInfo is a group as `group list --json` prints it.
type groupInfo struct {
	ID            string   `json:"id"`
	Name          string   `json:"name"`
	Machines      []string `json:"machines"` // ids
	HoldLimitMs   int64    `json:"hold_limit_ms"`
	TagEveryS     int64    `json:"tag_every_s,omitempty"`
	Consistency   string   `json:"consistency"`
	ProcessServer string   `json:"process_server,omitempty"`
}

func describeGroup(g *farsidev1.Group) groupInfo {
	return groupInfo{
		ID: g.GetId(), Name: g.GetName(), Machines: g.GetMachineIds(), HoldLimitMs: g.GetHoldLimitMs(), TagEveryS: g.GetTagEverySeconds(),
		Consistency: lowerName(g.GetConsistency(), "CONSISTENCY_"), ProcessServer: g.GetProcessServerId(),
	}
}

func newGroupSet(a *app) *cobra.Command {
	var machines []string
	var consistency string
	var hold, every time.Duration
	cmd := &cobra.Command{
		Use:   "set NAME --machine MACHINE...",
		Short: "Make a group, or change the one of that name",
		Long: `Set makes a replication group. Its machines are tagged at one instant: the file systems of
all are frozen together, for at most the hold limit, so no tag of one machine holds an effect whose
cause another's lacks. They must be protected and use one process server, which leads.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, err := groupConsistency(consistency)
			if err != nil {
				return err
			}
			req := &farsidev1.SetGroupRequest{
				Name: args[0], Machines: machines, HoldLimitMs: hold.Milliseconds(), TagEverySeconds: int64(every.Seconds()), Consistency: kind,
			}
			if cmd.Flags().Changed("tag-every") && every == 0 {
				req.TagEverySeconds = -1
			}
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.SetGroup(ctx, req)
				if err != nil {
					return err
				}
				g := describeGroup(r.GetGroup())
				return a.print(g, func(w io.Writer) { fmt.Fprintf(w, "group %s has %d machines\n", g.Name, len(g.Machines)) })
			})
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&machines, "machine", nil, "a member (repeat for more): all members from now on; none leaves them as they are")
	f.DurationVar(&hold, "hold-limit", 0, "longest time that file systems are held frozen (default 300ms at first)")
	f.DurationVar(&every, "tag-every", 0, "how often the process server tags the group by itself; 0s = never")
	f.StringVar(&consistency, "consistency", "", "of those tags: filesystem or application (default filesystem at first)")
	return cmd
}

func groupConsistency(name string) (farsidev1.Consistency, error) {
	kind, ok := map[string]farsidev1.Consistency{
		"":           farsidev1.Consistency_CONSISTENCY_UNSPECIFIED,
		"filesystem": farsidev1.Consistency_CONSISTENCY_FILESYSTEM, "application": farsidev1.Consistency_CONSISTENCY_APPLICATION,
	}[name]
	if !ok {
		return 0, fmt.Errorf("consistency %q: want filesystem or application: %w", name, dr.ErrInvalid)
	}
	return kind, nil
}

func newGroupList(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the groups",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.ListGroups(ctx, &farsidev1.ListGroupsRequest{})
				if err != nil {
					return err
				}
				list := []groupInfo{}
				for _, g := range r.GetGroups() {
					list = append(list, describeGroup(g))
				}
				return a.print(list, func(w io.Writer) {
					table(w, "NAME\tMACHINES\tTAG EVERY\tCONSISTENCY\tHOLD LIMIT", func(row func(string, ...any)) {
						for _, g := range list {
							row("%s\t%d\t%v\t%s\t%d ms", g.Name, len(g.Machines), time.Duration(g.TagEveryS)*time.Second, g.Consistency, g.HoldLimitMs)
						}
					})
				})
			})
		},
	}
}

// groupTag is what `group tag --json` prints.
type groupTag struct {
	ID          string    `json:"id"`
	Name        string    `json:"name"`
	Consistency string    `json:"consistency"`
	Time        time.Time `json:"time"`
	HeldMs      float64   `json:"held_ms"` // longest time that a machine was frozen
}

func newGroupTag(a *app) *cobra.Command {
	var consistency string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "tag GROUP NAME",
		Short: "Mark the present moment in all machines of a group, and wait until the marks are durable",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, err := groupConsistency(consistency)
			if err != nil {
				return err
			}
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.TagGroup(ctx, &farsidev1.TagGroupRequest{Group: args[0], Name: args[1], Consistency: kind, TimeoutMs: timeout.Milliseconds()})
				if err != nil {
					return err
				}
				t := groupTag{
					ID: r.GetTag().GetId(), Name: r.GetTag().GetName(), Consistency: lowerName(r.GetTag().GetConsistency(), "CONSISTENCY_"),
					Time: utc(r.GetTag().GetTimeNs()), HeldMs: r.GetTag().GetHeldMs(),
				}
				return a.print(t, func(w io.Writer) {
					fmt.Fprintf(w, "tag %q, %s consistent, of group %s; held for %.0f ms\n", t.Name, t.Consistency, args[0], t.HeldMs)
				})
			})
		},
	}
	cmd.Flags().StringVar(&consistency, "consistency", "", "filesystem or application (default the group's)")
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to wait")
	return cmd
}

// groupPoint is a moment of `group points --json`.
type groupPoint struct {
	ID          string                 `json:"id"`
	Name        string                 `json:"name"`
	Consistency string                 `json:"consistency"`
	Time        time.Time              `json:"time"`
	Complete    bool                   `json:"complete"` // each member holds it
	Members     map[string]dr.Position `json:"members"`  // by machine id
}

func newGroupPoints(a *app) *cobra.Command {
	var limit int32
	cmd := &cobra.Command{
		Use:   "points GROUP",
		Short: "List the moments to which a group can be brought back as a whole",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.ListGroupPoints(ctx, &farsidev1.ListGroupPointsRequest{Group: args[0], Limit: limit})
				if err != nil {
					return err
				}
				list := []groupPoint{}
				for _, p := range r.GetPoints() {
					g := groupPoint{
						ID: p.GetId(), Name: p.GetName(), Consistency: lowerName(p.GetConsistency(), "CONSISTENCY_"), Time: utc(p.GetTimeNs()),
						Complete: p.GetComplete(), Members: map[string]dr.Position{},
					}
					for _, m := range p.GetMembers() {
						g.Members[m.GetMachineId()] = position(m.GetPosition())
					}
					list = append(list, g)
				}
				return a.print(list, func(w io.Writer) { printGroupPoints(w, list) })
			})
		},
	}
	cmd.Flags().Int32Var(&limit, "limit", 0, "at most so many, the newest (default 1000)")
	return cmd
}

func printGroupPoints(w io.Writer, list []groupPoint) {
	table(w, "TIME\tNAME\tCONSISTENCY\tMACHINES\tCOMPLETE", func(row func(string, ...any)) {
		for _, p := range list {
			complete := "yes"
			if !p.Complete {
				complete = "no: not all machines hold it"
			}
			row("%s\t%s\t%s\t%d\t%s", p.Time.Format(time.RFC3339Nano), p.Name, p.Consistency, len(p.Members), complete)
		}
	})
}

func newGroupDelete(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "delete GROUP",
		Short: "End a group; its machines and their points stay",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				_, err := c.DeleteGroup(ctx, &farsidev1.DeleteGroupRequest{Group: args[0]})
				return err
			})
		},
	}
}
