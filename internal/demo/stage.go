package demo

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
)

// stage is the four roles as processes, set up the way an administrator does it: a configuration file each, a
// one-time token each, farside join.
type stage struct {
	dir       string
	self      string // this program
	processes []*process
	far       far
}

// role is one of the programs on the stage.
type role struct {
	verb string // of the command line, and name of its files
	join farsidev1.Role
	conf string // configuration file; %[1]s is its data directory
}

// path returns a path in the work directory.
func (s *stage) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// tapSocket is where the agent's tap listens.
func (s *stage) tapSocket() string { return s.path("tap.sock") }

// tapURI is where the tap of a demo in the work directory dir is reached.
func tapURI(dir string) string { return "nbd+unix:///?socket=" + filepath.Join(dir, "tap.sock") }

// roles returns the roles that join. The agent offers the disk for protection.
func (s *stage) roles(driver, disk string) []role {
	agent := "data: %[1]s\nloop_devices: true\ncapture:\n  driver: " + driver + "\n"
	if driver == "tap" {
		agent += fmt.Sprintf("  tap:\n    socket: %s\n    disks:\n      - name: disk\n        path: %s\n", s.tapSocket(), disk)
	}
	return []role{
		{"process-server", farsidev1.Role_ROLE_PROCESS_SERVER, "data: %[1]s\nlisten: 127.0.0.1:0\n"},
		{"master-target", farsidev1.Role_ROLE_MASTER_TARGET, "data: %[1]s\nlisten: 127.0.0.1:0\n"},
		{"agent", farsidev1.Role_ROLE_AGENT, agent},
	}
}

// raise starts the configuration server, lets the other roles join, and starts them.
func raise(ctx context.Context, dir, driver, disk string) (s *stage, err error) {
	s = &stage{dir: dir}
	if s.self, err = os.Executable(); err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.strike())
		}
	}()
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	if err := s.start("config-server", fmt.Sprintf("data_dir: %%[1]s\nlisten: 127.0.0.1:%d\nreport_every: 200ms\n", port)); err != nil {
		return s, err
	}
	if err := s.connect(ctx); err != nil {
		return s, err
	}
	for _, r := range s.roles(driver, disk) {
		if err := s.join(ctx, r); err != nil {
			return s, err
		}
		if err := s.start(r.verb, r.conf); err != nil {
			return s, err
		}
	}
	for _, r := range s.roles(driver, disk) {
		n, err := s.online(ctx, r)
		if err != nil {
			return s, err
		}
		if r.join == farsidev1.Role_ROLE_AGENT {
			s.far.machine = n.GetMachineId()
		}
	}
	return s, nil
}

// start writes a role's configuration and starts it.
func (s *stage) start(verb, conf string) error {
	file := s.path(verb + ".yaml")
	text := fmt.Sprintf(conf, s.path(verb))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return fmt.Errorf("configure %s: %w", verb, err)
	}
	p, err := start(verb, s.path(verb+".log"), exec.Command(s.self, verb, "--config", file))
	if err != nil {
		return err
	}
	s.processes = append(s.processes, p)
	return nil
}

// connect waits for the configuration server and for the context file that it writes at its first start.
func (s *stage) connect(ctx context.Context) error {
	return poll(ctx, 20*time.Second, "wait for the configuration server", func(ctx context.Context) (bool, error) {
		if err := s.ended(); err != nil {
			return false, err
		}
		c, err := api.LoadContext(s.path("config-server", "admin.json"))
		if err != nil {
			return false, nil //nolint:nilerr // not there yet
		}
		if s.far.c == nil {
			if s.far.c, err = api.NewClient(c); err != nil {
				return false, err
			}
		}
		_, err = s.far.c.GetServer(ctx, &farsidev1.GetServerRequest{})
		return err == nil, nil
	})
}

// join buys a role its certificate with a one-time token.
func (s *stage) join(ctx context.Context, r role) error {
	t, err := s.far.c.CreateToken(ctx, &farsidev1.CreateTokenRequest{Role: r.join, Name: "demo " + r.verb})
	if err != nil {
		return fmt.Errorf("make a token for the %s: %w", r.verb, err)
	}
	cmd := exec.CommandContext(ctx, s.self, "join", "--data", s.path(r.verb), t.GetToken())
	dieWithParent(cmd)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("join the %s: %w: %s", r.verb, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// online waits until the node of a role has reported.
func (s *stage) online(ctx context.Context, r role) (*farsidev1.Node, error) {
	var found *farsidev1.Node
	err := poll(ctx, 30*time.Second, "wait for the "+r.verb, func(ctx context.Context) (bool, error) {
		if err := s.ended(); err != nil {
			return false, err
		}
		list, err := s.far.c.ListNodes(ctx, &farsidev1.ListNodesRequest{Role: r.join})
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

// ended says which process has ended that should run.
func (s *stage) ended() error {
	for _, p := range s.processes {
		if err := p.ended(); err != nil {
			return err
		}
	}
	return nil
}

// strike ends all processes, the last first.
func (s *stage) strike() error {
	var err error
	for i := len(s.processes) - 1; i >= 0; i-- {
		err = errors.Join(err, s.processes[i].stop())
	}
	s.processes = nil
	if s.far.c != nil {
		err = errors.Join(err, s.far.c.Close())
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
