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

// roles are those that a node can join as.
var roles = map[string]farsidev1.Role{
	"agent":          farsidev1.Role_ROLE_AGENT,
	"process-server": farsidev1.Role_ROLE_PROCESS_SERVER,
	"master-target":  farsidev1.Role_ROLE_MASTER_TARGET,
}

func roleName(r farsidev1.Role) string {
	for name, role := range roles {
		if role == r {
			return name
		}
	}
	if r == farsidev1.Role_ROLE_CONFIG_SERVER {
		return "config-server"
	}
	return "unknown"
}

// tokenMade is what `token create --json` prints.
type tokenMade struct {
	Token   string    `json:"token"`
	ID      string    `json:"id"`
	Role    string    `json:"role"`
	Expires time.Time `json:"expires"`
}

func newToken(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Make tokens that let nodes join"}
	cmd.AddCommand(newTokenCreate(a))
	return cmd
}

func newTokenCreate(a *app) *cobra.Command {
	var ttl time.Duration
	var name string
	cmd := &cobra.Command{
		Use:   "create agent|process-server|master-target",
		Short: "Make a token with which one node can join once",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			role, ok := roles[args[0]]
			if !ok {
				return fmt.Errorf("role %q: want agent, process-server or master-target: %w", args[0], dr.ErrInvalid)
			}
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.CreateToken(ctx, &farsidev1.CreateTokenRequest{Role: role, TtlSeconds: int64(ttl.Seconds()), Name: name})
				if err != nil {
					return err
				}
				made := tokenMade{Token: r.GetToken(), ID: r.GetTokenId(), Role: args[0], Expires: utc(r.GetExpiresNs())}
				return a.print(made, func(w io.Writer) { fmt.Fprintln(w, made.Token) })
			})
		},
	}
	cmd.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long the token is valid")
	cmd.Flags().StringVar(&name, "name", "", "name of the node (default its host name)")
	return cmd
}
