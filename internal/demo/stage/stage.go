// Package stage sets up a whole deployment on one machine for the demo and for tests: the four roles as
// processes of this program, joined and configured as an administrator would.
//
// Main types: Stage, the processes; Far, the deployment as seen through its API; Opened, an open view with a
// connection to its disk; Process, a program that dies with its caller.
//
// It wires nothing by hand: all goes through configuration files, tokens and the API. It makes no disks and no load.
// A Stage belongs to one goroutine.
package stage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/dr"
)

// Stage is the four roles as processes, set up the way an administrator does it: a configuration file each, a
// one-time token each, farside join.
type Stage struct {
	Processes []*Process
	Far       Far

	Options
}

// Options say how to set a deployment up.
type Options struct {
	Dir     string // where files of all roles go; it must be there
	Program string // the farside program
	Driver  string // of capture: "ebpf" or "tap"
	Disk    string // the disk that a tap stands in front of
	Ring    string // size of the capture's buffer; "" is the driver's default
	Pin     string // where the capture is kept while the agent does not run; "": it ends with the agent
	// Settings are further lines of configuration files, or others instead of the
	// usual ones: by role ("agent") and key ("memory").
	Settings map[string]map[string]string
	// Elsewhere is set when the agent runs on another machine: it joins, for that
	// machine to have the directory "agent" and "agent.yaml", but isn't started.
	Elsewhere bool
}

// role is one of the programs on the stage.
type role struct {
	verb string // of the command line, and name of its files
	join farsidev1.Role
	conf map[string]string // configuration: values by top-level key
}

// path returns a path in the work directory.
func (s *Stage) path(elem ...string) string {
	return filepath.Join(append([]string{s.Dir}, elem...)...)
}

// tapSocket is where the agent's tap listens.
func (s *Stage) tapSocket() string { return s.path("tap.sock") }

// TapURI is where the tap of a stage in the work directory dir is reached.
func TapURI(dir string) string { return "nbd+unix:///?socket=" + filepath.Join(dir, "tap.sock") }

// roles returns the roles that join. The agent offers the disk for protection.
func (s *Stage) roles() []role {
	capture := "{driver: " + s.Driver + ", pin: " + cmp.Or(s.Pin, "off")
	if s.Ring != "" {
		capture += ", ring: " + s.Ring
	}
	if s.Driver == "tap" {
		capture += fmt.Sprintf(", tap: {socket: %q, disks: [{name: disk, path: %q}]}", s.tapSocket(), s.Disk)
	}
	return []role{
		{"process-server", farsidev1.Role_ROLE_PROCESS_SERVER, map[string]string{"listen": "127.0.0.1:0"}},
		{"master-target", farsidev1.Role_ROLE_MASTER_TARGET, map[string]string{"listen": "127.0.0.1:0"}},
		{"agent", farsidev1.Role_ROLE_AGENT, map[string]string{"loop_devices": "true", "capture": capture + "}"}},
	}
}

// Raise starts the configuration server, lets the other roles join, and starts them.
func Raise(ctx context.Context, o Options) (s *Stage, err error) {
	s = &Stage{Options: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Strike())
		}
	}()
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	err = s.prepare("config-server", map[string]string{"listen": fmt.Sprintf("127.0.0.1:%d", port), "report_every": "200ms"})
	if err == nil {
		err = s.Again("config-server")
	}
	if err != nil {
		return s, err
	}
	if err := s.connect(ctx); err != nil {
		return s, err
	}
	for _, r := range s.roles() {
		if err := s.join(ctx, r); err != nil {
			return s, err
		}
		if err := s.prepare(r.verb, r.conf); err != nil {
			return s, err
		}
		if r.join == farsidev1.Role_ROLE_AGENT && o.Elsewhere {
			continue
		}
		if err := s.Again(r.verb); err != nil {
			return s, err
		}
	}
	if o.Elsewhere {
		return s, nil
	}
	return s, s.Wait(ctx, pollLong)
}

// Wait waits until all that joined have reported.
func (s *Stage) Wait(ctx context.Context, limit time.Duration) error {
	for _, r := range s.roles() {
		n, err := s.online(ctx, r, limit)
		if err != nil {
			return err
		}
		if r.join == farsidev1.Role_ROLE_AGENT {
			s.Far.Machine = n.GetMachineId()
		}
	}
	return nil
}

// prepare writes a role's configuration.
func (s *Stage) prepare(verb string, conf map[string]string) error {
	conf = maps.Clone(conf)
	maps.Copy(conf, s.Settings[verb])
	return s.configure(verb, conf)
}

// configure writes the configuration file of the role whose files have that name.
func (s *Stage) configure(name string, conf map[string]string) error {
	conf = maps.Clone(conf)
	if conf["data"] == "" {
		conf["data"] = s.path(name)
	}
	var text strings.Builder
	for _, key := range slices.Sorted(maps.Keys(conf)) {
		fmt.Fprintf(&text, "%s: %s\n", key, conf[key])
	}
	if err := os.WriteFile(s.path(name+".yaml"), []byte(text.String()), 0o600); err != nil {
		return fmt.Errorf("configure %s: %w", name, err)
	}
	return nil
}

// Again starts a role that isn't running, with the configuration that it has.
func (s *Stage) Again(verb string) error {
	p, err := Start(verb, s.path(verb+".log"), exec.Command(s.Program, verb, "--config", s.path(verb+".yaml")))
	if err != nil {
		return err
	}
	s.Processes = append(s.Processes, p)
	return nil
}

// Halt ends a role for Again: at once, as a crash would, or when it is ready.
func (s *Stage) Halt(verb string, crash bool) error {
	i := slices.IndexFunc(s.Processes, func(p *Process) bool { return p.Name == verb })
	if i < 0 {
		return fmt.Errorf("halt %s: not running: %w", verb, dr.ErrNotFound)
	}
	p := s.Processes[i]
	s.Processes = slices.Delete(s.Processes, i, i+1)
	if crash {
		return p.Kill()
	}
	return p.Stop()
}

// connect waits for the configuration server and for the context file that it writes at its first start.
func (s *Stage) connect(ctx context.Context) error {
	return Poll(ctx, 20*time.Second, "wait for the configuration server", func(ctx context.Context) (bool, error) {
		if err := s.Ended(); err != nil {
			return false, err
		}
		c, err := api.LoadContext(s.path("config-server", "admin.json"))
		if err != nil {
			return false, nil //nolint:nilerr // not there yet
		}
		if s.Far.Client == nil {
			if s.Far.Client, err = api.NewClient(c); err != nil {
				return false, err
			}
		}
		_, err = s.Far.Client.GetServer(ctx, &farsidev1.GetServerRequest{})
		return err == nil, nil
	})
}

// join buys a role its certificate with a one-time token.
func (s *Stage) join(ctx context.Context, r role) error { return s.joinAs(ctx, r.join, r.verb) }

// nameOf is how a node is called whose files have that name.
func nameOf(files string) string { return "demo " + files }

func (s *Stage) joinAs(ctx context.Context, as farsidev1.Role, name string) error {
	t, err := s.Far.Client.CreateToken(ctx, &farsidev1.CreateTokenRequest{Role: as, Name: nameOf(name)})
	if err != nil {
		return fmt.Errorf("make a token for the %s: %w", name, err)
	}
	cmd := exec.CommandContext(ctx, s.Program, "join", "--data", s.path(name), t.GetToken())
	dieWithParent(cmd)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("join the %s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// pollLong is how long a node may take to report.
const pollLong = 30 * time.Second

// online waits until the node of a role has reported.
func (s *Stage) online(ctx context.Context, r role, limit time.Duration) (*farsidev1.Node, error) {
	var found *farsidev1.Node
	err := Poll(ctx, limit, "wait for the "+r.verb, func(ctx context.Context) (bool, error) {
		if err := s.Ended(); err != nil {
			return false, err
		}
		list, err := s.Far.Client.ListNodes(ctx, &farsidev1.ListNodesRequest{Role: r.join})
		if err != nil {
			return false, err
		}
		for _, n := range list.GetNodes() {
			if n.GetOnline() {
				found = n
			}
		}
		return found != nil, nil
	})
	return found, err
}

// Ended says which process has ended that should run.
func (s *Stage) Ended() error {
	for _, p := range s.Processes {
		if err := p.Ended(); err != nil {
			return err
		}
	}
	return nil
}

// Strike ends all processes, the last first.
func (s *Stage) Strike() error {
	var err error
	for i := len(s.Processes) - 1; i >= 0; i-- {
		err = errors.Join(err, s.Processes[i].Stop())
	}
	s.Processes = nil
	if s.Far.Client != nil {
		err = errors.Join(err, s.Far.Client.Close())
	}
	return err
}

// freePort returns a TCP port of the loopback that is free now.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
