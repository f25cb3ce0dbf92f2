package main

import (
	"github.com/spf13/cobra"

	"farside/internal/agent"
	"farside/internal/api"
	"farside/internal/confserver"
	"farside/internal/mastertarget"
	"farside/internal/procserver"
)

// newRoot lists every verb. Nothing registers itself.
func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "farside",
		Short: "Disaster recovery: replicate machines write by write, run them on the far side",
		Long: `Farside replicates the disks of machines, write by write, to a second site and
opens them there as they were at any write.

Start with "farside demo". Exit codes: 0 done, 1 failed, 2 wrong usage or input,
3 not found, 4 denied, 5 corrupt or a check failed, 6 unavailable or full,
7 exists already, 8 not supported here, 130 interrupted.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRun: func(*cobra.Command, []string) {
			a.started = true
		},
	}
	root.PersistentFlags().BoolVar(&a.json, "json", false, "print JSON for programs")
	root.PersistentFlags().StringVar(&a.context, "context", "", "file that names the configuration server and holds the token (default $"+api.ContextVariable+")")
	root.AddCommand(
		newDemo(a),
		newRole(a, "config-server", "Run a configuration server: catalog, certificates, API",
			roleRun[confserver.Config]{confserver.LoadConfig, confserver.Run}),
		newRole(a, "process-server", "Run a process server: takes, keeps and sends on the streams of agents",
			roleRun[procserver.Config]{procserver.LoadConfig, lazily(procserver.Run)}),
		newRole(a, "master-target", "Run a master target: keeps the history of machines and opens it",
			roleRun[mastertarget.Config]{mastertarget.LoadConfig, mastertarget.Run}),
		withHooks(a, newRole(a, "agent", "Run an agent: captures the writes of this machine's disks",
			roleRun[agent.Config]{agent.LoadConfig, agent.Run})),
		newMachine(a),
		newPoint(a),
		newGroup(a),
		newView(a),
		newNode(a),
		newExport(a),
		newToken(a),
		newJoin(a),
		newCheck(a),
		newInspect(a),
		newVersion(a),
		newWatchdog(),
	)
	return root
}
