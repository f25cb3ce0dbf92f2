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

func newMachine(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "machine", Short: "See and protect machines"}
	cmd.AddCommand(newMachineList(a), newMachineShow(a), newMachineProtect(a), newMachineUnprotect(a))
	return cmd
}

func newMachineList(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the machines with their state and RPO",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				list := []machineInfo{}
				for req := (&farsidev1.ListMachinesRequest{}); ; {
					r, err := c.ListMachines(ctx, req)
					if err != nil {
						return err
					}
					for _, m := range r.GetMachines() {
						list = append(list, describeMachine(m))
					}
					if req.PageToken = r.GetNextPageToken(); req.PageToken == "" {
						break
					}
				}
				return a.print(list, func(w io.Writer) { printMachines(w, list) })
			})
		},
	}
}

func newMachineShow(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "show MACHINE",
		Short: "Show all that is known of one machine, also the disks that it could protect",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.GetMachine(ctx, &farsidev1.GetMachineRequest{Machine: args[0]})
				if err != nil {
					return err
				}
				m := describeMachine(r.GetMachine())
				return a.print(m, m.human)
			})
		},
	}
}

// protectOptions are the flags of `machine protect`.
type protectOptions struct {
	disks, remove               []string
	window                      time.Duration
	processServer, masterTarget string
	codec, capture              string
	points                      pointFlags
}

// pointFlags say which points are made on a schedule; negative means that the flag was not given.
type pointFlags struct {
	fileSystem, application, limit time.Duration
}

const notGiven = -1

func (p *pointFlags) schedule() *farsidev1.PointSchedule {
	if p.fileSystem == notGiven && p.application == notGiven && p.limit == notGiven {
		return nil
	}
	ms := func(d time.Duration) *int64 {
		if d == notGiven {
			return nil
		}
		n := d.Milliseconds()
		return &n
	}
	return &farsidev1.PointSchedule{FilesystemEveryMs: ms(p.fileSystem), ApplicationEveryMs: ms(p.application), FreezeLimitMs: ms(p.limit)}
}

func newMachineProtect(a *app) *cobra.Command {
	var o protectOptions
	cmd := &cobra.Command{
		Use:   "protect MACHINE --disk PATH...",
		Short: "Replicate disks of a machine",
		Long: `Protect adds disks to those of a machine that are replicated, and changes how.
Called again it only changes what is named.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := o.request(args[0])
			if err != nil {
				return err
			}
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.ProtectMachine(ctx, req)
				if err != nil {
					return err
				}
				m := describeMachine(r.GetMachine())
				return a.print(m, func(w io.Writer) {
					fmt.Fprintf(w, "%s: %d disks will be replicated; \"farside machine show %s\" tells how far it is\n", m.Name, len(m.Disks), args[0])
				})
			})
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&o.disks, "disk", nil, "path of a disk to replicate, as on the machine (repeat for more)")
	f.StringArrayVar(&o.remove, "remove-disk", nil, "path of a disk to replicate no longer")
	f.DurationVar(&o.window, "history", 0, "how far back every write is kept (default 24h at first)")
	f.StringVar(&o.processServer, "process-server", "", "node to send to (default the least loaded)")
	f.StringVar(&o.masterTarget, "master-target", "", "node to keep the history on (default the least loaded)")
	f.StringVar(&o.codec, "codec", "", "compression of frames: none, zstd, s2 (default chosen by the agent)")
	f.StringVar(&o.capture, "capture", "", "capture driver: ebpf, tap, qemu, scan (default the one that fits the disks)")
	f.DurationVar(&o.points.fileSystem, "filesystem-points", notGiven, "make a file-system point every so often; 0 = no more (default as it is, none at first)")
	f.DurationVar(&o.points.application, "application-points", notGiven, "make an application point every so often; 0 = no more (default as it is, none at first)")
	f.DurationVar(&o.points.limit, "freeze-limit", notGiven, "longest time that a file system is frozen for a point (default as it is, 10s at first)")
	return cmd
}

func (o *protectOptions) request(machine string) (*farsidev1.ProtectMachineRequest, error) {
	req := &farsidev1.ProtectMachineRequest{
		Machine: machine, DiskPaths: o.disks, RemoveDiskPaths: o.remove, HistoryWindowSeconds: int64(o.window.Seconds()),
		ProcessServer: o.processServer, MasterTarget: o.masterTarget, Points: o.points.schedule(),
	}
	codec, ok := map[string]farsidev1.Codec{
		"":     farsidev1.Codec_CODEC_UNSPECIFIED,
		"none": farsidev1.Codec_CODEC_NONE, "zstd": farsidev1.Codec_CODEC_ZSTD, "s2": farsidev1.Codec_CODEC_S2,
	}[o.codec]
	if !ok {
		return nil, fmt.Errorf("codec %q: want none, zstd or s2: %w", o.codec, dr.ErrInvalid)
	}
	if o.codec != "" || o.capture != "" {
		req.Settings = &farsidev1.AgentSettings{Codec: codec, CaptureDriver: o.capture}
	}
	return req, nil
}

func newMachineUnprotect(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "unprotect MACHINE",
		Short: "End the replication of a machine; its history stays readable",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.UnprotectMachine(ctx, &farsidev1.UnprotectMachineRequest{Machine: args[0]})
				if err != nil {
					return err
				}
				m := describeMachine(r.GetMachine())
				return a.print(m, func(w io.Writer) { fmt.Fprintf(w, "%s is no longer replicated; its history stays\n", m.Name) })
			})
		},
	}
}

// lowerName turns the name of an enum value, such as MACHINE_STATE_OFFLINE, into a word, such as "offline".
func lowerName(v fmt.Stringer, prefix string) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(v.String(), prefix)), "_", "-")
}
