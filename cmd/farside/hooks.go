package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"farside/internal/quiesce"
)

// withHooks adds what is done on an agent's machine besides running it to the agent's verb.
func withHooks(a *app, role *cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: "hooks", Short: "See and install programs that prepare applications for a point"}
	cmd.AddCommand(newHooksList(a), newHooksInstall(a))
	role.AddCommand(cmd, newRelease(a))
	return role
}

// readyHook is a hook as --json prints it.
type readyHook struct {
	Name string `json:"name"`
	Text string `json:"text"`
}

func newHooksList(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the hooks that come with the program, and what they do",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			all, err := quiesce.ReadyHooks()
			if err != nil {
				return err
			}
			list := []readyHook{}
			for _, h := range all {
				list = append(list, readyHook{h.Name, h.Text})
			}
			return a.print(list, func(w io.Writer) {
				for _, h := range list {
					fmt.Fprintf(w, "%s\n\n%s\n", h.Name, h.Text)
				}
			})
		},
	}
}

func newHooksInstall(a *app) *cobra.Command {
	var dir string
	var force bool
	cmd := &cobra.Command{
		Use:   "install NAME...",
		Short: "Install hooks that come with the program on this machine",
		Long: `Install writes hooks into pre-freeze.d and post-thaw.d. From then on they run around
each application point of this machine.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			files := []string{}
			for _, name := range args {
				made, err := quiesce.InstallHook(dir, name, force)
				if err != nil {
					return err
				}
				files = append(files, made...)
			}
			return a.print(files, func(w io.Writer) {
				for _, f := range files {
					fmt.Fprintln(w, f)
				}
			})
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "/etc/farside", "directory that holds pre-freeze.d and post-thaw.d")
	cmd.Flags().BoolVar(&force, "force", false, "replace hooks that were changed")
	return cmd
}
