package stage

import (
	"context"
	"fmt"
	"maps"
	"os/exec"

	farsidev1 "farside/internal/api/farside/v1"
)

// AddAgent lets one more agent join and starts it. It plays the agent of another
// machine: its disks are this machine's as well. name names its files and its machine.
func (s *Stage) AddAgent(ctx context.Context, name string) (Far, error) {
	r := s.roles()[2]
	if err := s.joinAs(ctx, r.join, name); err != nil {
		return Far{}, err
	}
	conf := maps.Clone(r.conf)
	maps.Copy(conf, s.Settings[r.verb])
	if err := s.configure(name, conf); err != nil {
		return Far{}, err
	}
	p, err := Start(name, s.path(name+".log"), exec.Command(s.Program, r.verb, "--config", s.path(name+".yaml")))
	if err != nil {
		return Far{}, err
	}
	s.Processes = append(s.Processes, p)
	far := Far{Client: s.Far.Client}
	err = Poll(ctx, pollLong, "wait for "+name, func(ctx context.Context) (bool, error) {
		if err := s.Ended(); err != nil {
			return false, err
		}
		list, err := s.Far.Client.ListNodes(ctx, &farsidev1.ListNodesRequest{Role: r.join})
		for _, n := range list.GetNodes() {
			if n.GetOnline() && n.GetName() == nameOf(name) {
				far.Machine = n.GetMachineId()
			}
		}
		return far.Machine != "", err
	})
	if err != nil {
		return far, fmt.Errorf("add agent: %w", err)
	}
	return far, nil
}
