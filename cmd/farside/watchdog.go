package main

import (
	"github.com/spf13/cobra"

	"farside/internal/quiesce"
)

// newWatchdog makes the verb by which an agent starts its watchdog. It is not for people.
func newWatchdog() *cobra.Command {
	return &cobra.Command{
		Use:    quiesce.WatchdogVerb,
		Short:  "Thaw the file systems that an agent froze, if it can't (started by the agent)",
		Args:   cobra.NoArgs,
		Hidden: true,
		RunE:   func(*cobra.Command, []string) error { return quiesce.RunWatchdog() },
	}
}
