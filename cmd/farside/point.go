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

func newPoint(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "point", Short: "See and mark the moments to which a machine can be brought back"}
	cmd.AddCommand(newPointList(a), newPointTag(a))
	return cmd
}

// pointList is what `point list --json` prints.
type pointList struct {
	Spans     []spanInfo   `json:"spans"`
	Tags      []tagPoint   `json:"tags"`
	Newest    *pointInfo   `json:"newest,omitempty"`
	Horizon   *dr.Position `json:"horizon,omitempty"`
	Truncated bool         `json:"truncated,omitempty"`
}

type spanInfo struct {
	Accuracy  string      `json:"accuracy"`
	Open      bool        `json:"open,omitempty"`   // no position within can be opened
	Reason    string      `json:"reason,omitempty"` // why not every write can be opened
	First     dr.Position `json:"first"`
	Last      dr.Position `json:"last"`
	FirstTime time.Time   `json:"first_time"`
	LastTime  time.Time   `json:"last_time"`
}

type tagPoint struct {
	ID          string      `json:"id"`
	Name        string      `json:"name"`
	Consistency string      `json:"consistency"`
	Position    dr.Position `json:"position"`
	Time        time.Time   `json:"time"`
	Detail      string      `json:"detail,omitempty"` // why it is not what was asked
}

func newPointList(a *app) *cobra.Command {
	var since time.Duration
	var limit int32
	cmd := &cobra.Command{
		Use:   "list MACHINE",
		Short: "List the spans of history and the tags",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &farsidev1.ListPointsRequest{Machine: args[0], Limit: limit}
			if since > 0 {
				req.FromNs = time.Now().Add(-since).UnixNano()
			}
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.ListPoints(ctx, req)
				if err != nil {
					return err
				}
				list := describePoints(r)
				return a.print(list, list.human)
			})
		},
	}
	cmd.Flags().DurationVar(&since, "since", 0, "only the last so long (default all)")
	cmd.Flags().Int32Var(&limit, "limit", 0, "at most so many spans and tags, the newest (default 1000)")
	return cmd
}

func describePoints(r *farsidev1.ListPointsResponse) *pointList {
	list := &pointList{
		Spans: []spanInfo{}, Tags: []tagPoint{}, Newest: describePoint(r.GetNewest()),
		Horizon: positionOrNil(r.GetHorizon()), Truncated: r.GetTruncated(),
	}
	for _, s := range r.GetSpans() {
		list.Spans = append(list.Spans, spanInfo{
			Accuracy: lowerName(s.GetAccuracy(), "ACCURACY_"), Open: s.GetOpen(), Reason: s.GetReason(),
			First: position(s.GetFirst()), Last: position(s.GetLast()),
			FirstTime: utc(s.GetFirstTimeNs()), LastTime: utc(s.GetLastTimeNs()),
		})
	}
	for _, t := range r.GetTags() {
		list.Tags = append(list.Tags, describeTag(t))
	}
	return list
}

func describeTag(t *farsidev1.TagPoint) tagPoint {
	return tagPoint{
		ID: t.GetId(), Name: t.GetName(), Consistency: lowerName(t.GetConsistency(), "CONSISTENCY_"),
		Position: position(t.GetPosition()), Time: utc(t.GetTimeNs()),
		Detail: t.GetDetail(),
	}
}

// spanReasons say why a span is not exact.
var spanReasons = map[string]string{
	"sync": "the disks were being synced", "link-behind": "the link was slower than the changes",
}

func (l *pointList) human(w io.Writer) {
	table(w, "FROM\tTO\tPOSITIONS\tEACH WRITE", func(row func(string, ...any)) {
		for _, s := range l.Spans {
			each := map[string]string{"exact": "yes", "epoch": "no, only the end"}[s.Accuracy]
			if s.Open {
				each = "none can be opened"
			}
			if text := spanReasons[s.Reason]; text != "" {
				each += ": " + text
			}
			row("%s\t%s\t%v to %v\t%s", s.FirstTime.Format(time.RFC3339Nano), s.LastTime.Format(time.RFC3339Nano), s.First, s.Last, each)
		}
	})
	for _, t := range l.Tags {
		fmt.Fprintf(w, "tag %q  %s  %v  %s\n", t.Name, t.Consistency, t.Position, t.Time.Format(time.RFC3339Nano))
	}
	if l.Newest != nil {
		fmt.Fprintf(w, "newest point %v at %s\n", l.Newest.Position, l.Newest.Time.Format(time.RFC3339Nano))
	} else {
		fmt.Fprintln(w, "nothing can be opened yet")
	}
}

func newPointTag(a *app) *cobra.Command {
	var consistency string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "tag MACHINE NAME",
		Short: "Mark the present moment, and wait until the mark is durable on the far side",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, ok := map[string]farsidev1.Consistency{
				"crash": farsidev1.Consistency_CONSISTENCY_CRASH, "filesystem": farsidev1.Consistency_CONSISTENCY_FILESYSTEM,
				"application": farsidev1.Consistency_CONSISTENCY_APPLICATION,
			}[consistency]
			if !ok {
				return fmt.Errorf("consistency %q: want crash, filesystem or application: %w", consistency, dr.ErrInvalid)
			}
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.TagPoint(ctx, &farsidev1.TagPointRequest{
					Machine: args[0], Name: args[1], Consistency: kind, TimeoutMs: timeout.Milliseconds(),
				})
				if err != nil {
					return err
				}
				t := describeTag(r.GetTag())
				return a.print(t, func(w io.Writer) {
					fmt.Fprintf(w, "tag %q, %s consistent, at %v, %s\n", t.Name, t.Consistency, t.Position, t.Time.Format(time.RFC3339Nano))
					if t.Detail != "" {
						fmt.Fprintf(w, "not %s consistent: %s\n", consistency, t.Detail)
					}
				})
			})
		},
	}
	cmd.Flags().StringVar(&consistency, "consistency", "crash", `"crash" (as a power cut), "filesystem" (frozen), or "application" (frozen, and hooks have run)`)
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to wait")
	return cmd
}
