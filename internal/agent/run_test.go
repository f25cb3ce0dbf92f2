package agent

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"runtime"
	"testing"
	"testing/fstest"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/link"
	"farside/internal/transport"
	"farside/internal/transport/transporttest"
)

func TestRunNeedsIdentity(t *testing.T) {
	err := Run(t.Context(), Config{Data: filepath.Join(t.TempDir(), "none")}, slog.New(slog.DiscardHandler))
	if !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("not joined: %v", err)
	}
}

func TestBootOf(t *testing.T) {
	now := time.Unix(5000, 0)
	h := &pb.HostInfo{BootId: "11223344-5566-4788-99aa-bbccddeeff00", BootNs: 2000e9}
	if b := bootOf(h, now); b.Up != 3000*time.Second || b.ID[0] != 0x11 || b.ID[15] != 0 {
		t.Errorf("%+v", b)
	}
	for _, h := range []*pb.HostInfo{nil, {}, {BootId: h.BootId}, {BootId: "x", BootNs: 1}} {
		if b := bootOf(h, now); b != (link.Boot{}) {
			t.Errorf("%v: %+v", h, b)
		}
	}
	if runtime.GOOS == "linux" && (boot().ID == [16]byte{} || boot().Up <= 0) {
		t.Errorf("this system: %+v", boot())
	}
}

// joined makes a data directory as joining does.
func joined(t *testing.T, role string) string {
	t.Helper()
	dir := t.TempDir()
	if err := transporttest.NewSite(t, nil).Identity(role).Save(dir); err != nil {
		t.Fatal(err)
	}
	if err := transport.WriteFile(filepath.Join(dir, "assignment.json"), []byte(`{"configServers":["127.0.0.1:1"]}`)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestRunNeedsAgentIdentity(t *testing.T) {
	err := Run(t.Context(), Config{Data: joined(t, transport.RoleProcessServer)}, slog.New(slog.DiscardHandler))
	if !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("joined as a process server: %v", err)
	}
}

// Without a configuration server the agent waits, and ends when told to.
func TestRunEnds(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	c := Config{Data: joined(t, transport.RoleAgent), Memory: minMemory, Capture: CaptureConfig{Driver: driverAuto}}
	if err := Run(ctx, c, slog.New(slog.DiscardHandler)); err != nil {
		t.Errorf("run: %v", err)
	}
}

func TestReporterFindsDisks(t *testing.T) {
	l := newLab(t)
	r := &reporter{agent: l.agent, machine: l.machine, root: machine(), want: wantedOf(Config{
		LoopDevices: true, Capture: CaptureConfig{Tap: TapConfig{Disks: []TapDisk{{"d", "/srv/disk.img"}}}},
	})}
	got := r.report().GetAgent()
	if got.GetMachineId() != l.machine.String() || len(got.GetDiscovered()) != 8 {
		t.Errorf("report %v", got)
	}
	r.root = fstest.MapFS{}
	if again := r.report().GetAgent(); len(again.GetDiscovered()) != 8 {
		t.Errorf("looked for disks again at once: %v", again)
	}
}
