package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"farside/internal/control"
	"farside/internal/dr"
)

// joined is what `join --json` prints.
type joined struct {
	Role    string        `json:"role"`
	Node    dr.NodeID     `json:"node"`
	Machine *dr.MachineID `json:"machine,omitempty"`
	Data    string        `json:"data"`
}

func newJoin(a *app) *cobra.Command {
	var data, role string
	var names []string
	cmd := &cobra.Command{
		Use:   "join --data DIR TOKEN",
		Short: "Make a node of this machine with a one-time token",
		Long: `Join buys a certificate with a token that "farside token create" made, and keeps it in a data
directory. Start the role then with that directory in its configuration file.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if data == "" {
				return usage{errors.New("--data is missing")}
			}
			peer, err := control.Join(cmd.Context(), control.JoinOptions{
				Token: args[0], Role: role, DataDir: data, Version: readVersion().Version, Names: names,
			})
			if err != nil {
				return err
			}
			j := joined{Role: peer.Role, Node: peer.Node, Data: data}
			if !peer.Machine.IsZero() {
				j.Machine = &peer.Machine
			}
			return a.print(j, func(w io.Writer) {
				fmt.Fprintf(w, "joined as %s, node %v; identity in %s\n", j.Role, j.Node, j.Data)
				if j.Machine != nil {
					fmt.Fprintf(w, "machine %v\n", *j.Machine)
				}
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&data, "data", "", "data directory of the node, as in its configuration file")
	f.StringVar(&role, "role", "", "refuse a token for another role")
	f.StringSliceVar(&names, "name", nil, "host names and addresses for the certificate, for foreign programs that use exports over TLS")
	return cmd
}
