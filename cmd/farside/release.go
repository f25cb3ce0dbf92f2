package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"farside/internal/agent"
)

// released is what `agent release --json` prints.
type released struct {
	Removed bool `json:"removed"` // there was a capture
}

func newRelease(a *app) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "release --config FILE",
		Short: "Take the capture of this machine's agent, which must not run, out of the kernel",
		Long: `An agent that ends leaves its capture in the kernel, so that the next one goes on where it stood.
Release ends the capture: before the program is removed from a machine. An agent that is started later compares whole disks.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if file == "" {
				return usage{errors.New("--config is missing")}
			}
			c, err := agent.LoadConfig(file)
			if err != nil {
				return err
			}
			removed, err := agent.Release(c)
			if err != nil {
				return err
			}
			return a.print(released{removed}, func(w io.Writer) {
				if removed {
					fmt.Fprintln(w, "the capture is ended")
				} else {
					fmt.Fprintln(w, "there was none")
				}
			})
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "the agent's configuration file (YAML)")
	return cmd
}
