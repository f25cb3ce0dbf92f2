package main

import (
	"context"
	"io"
	"time"

	"github.com/spf13/cobra"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
)

// nodeInfo is a node as `node list --json` prints it.
type nodeInfo struct {
	ID       string    `json:"id"`
	Name     string    `json:"name"`
	Role     string    `json:"role"`
	Machine  string    `json:"machine,omitempty"`
	Online   bool      `json:"online"`
	LastSeen time.Time `json:"last_seen"`
	Version  string    `json:"version"`
	Address  []string  `json:"addresses"`
	Notices  []notice  `json:"notices,omitempty"`
}

// notice is something that a person should know.
type notice struct {
	Code     string    `json:"code"`
	Severity string    `json:"severity"`
	Text     string    `json:"text"`
	Time     time.Time `json:"time"`
}

func newNode(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "node", Short: "See the nodes that joined"}
	cmd.AddCommand(&cobra.Command{
		Use:   "list",
		Short: "List the nodes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				list, err := listNodes(ctx, c)
				if err != nil {
					return err
				}
				return a.print(list, func(w io.Writer) { printNodes(w, list) })
			})
		},
	})
	return cmd
}

func listNodes(ctx context.Context, c *api.Client) ([]nodeInfo, error) {
	list := []nodeInfo{}
	for req := (&farsidev1.ListNodesRequest{}); ; {
		r, err := c.ListNodes(ctx, req)
		if err != nil {
			return nil, err
		}
		for _, n := range r.GetNodes() {
			list = append(list, nodeInfo{
				ID: n.GetId(), Name: n.GetName(), Role: roleName(n.GetRole()), Machine: n.GetMachineId(),
				Online: n.GetOnline(), LastSeen: utc(n.GetLastSeenNs()), Version: n.GetVersion(),
				Address: n.GetAddresses(), Notices: notices(n.GetNotices()),
			})
		}
		if req.PageToken = r.GetNextPageToken(); req.PageToken == "" {
			return list, nil
		}
	}
}

func printNodes(w io.Writer, list []nodeInfo) {
	table(w, "NAME\tROLE\tONLINE\tLAST SEEN\tVERSION\tID", func(row func(string, ...any)) {
		for _, n := range list {
			row("%s\t%s\t%v\t%s\t%s\t%s", n.Name, n.Role, n.Online, n.LastSeen.Format(time.DateTime), n.Version, n.ID)
		}
	})
	for _, n := range list {
		printNotices(w, n.Notices)
	}
}

func notices(list []*farsidev1.Notice) []notice {
	var out []notice
	for _, n := range list {
		out = append(out, notice{
			Code: n.GetCode(), Severity: lowerName(n.GetSeverity(), "SEVERITY_"), Text: n.GetText(), Time: utc(n.GetTimeNs()),
		})
	}
	return out
}
