package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/api/farside/v1/farsidev1connect"
	"farside/internal/dr"
	"farside/internal/nbd"
	"farside/internal/transport"
)

// fakeServer is a configuration server that knows one machine, "web", with one disk of 3 MiB, and answers always the
// same. It is there to test what the command line asks and prints.
type fakeServer struct {
	farsidev1connect.UnimplementedFarsideServiceHandler
	export string // URI of the disk's NBD export
}

const fakeTime = 1_700_000_000_123_456_789

func notFound(what string) error {
	return api.NewError(connect.CodeNotFound, api.KindNotFound, errors.New("no machine "+what))
}

func fakeMachine() *farsidev1.Machine {
	return &farsidev1.Machine{
		Id: "fa251de0-0000-4000-8000-000000000001", Name: "web", State: farsidev1.MachineState_MACHINE_STATE_PROTECTED,
		Rpo:        &farsidev1.Rpo{Known: true, NowMs: 12, P50Ms: 20, P99Ms: 90, MaxMs: 100},
		Disks:      []*farsidev1.MachineDisk{{Id: 1, Path: "/dev/sda", Size: 3 << 20, State: "ok"}},
		Discovered: []*farsidev1.DiscoveredDisk{{Path: "/dev/sdb", Size: 5 << 30, Kind: "disk", Reason: "it is swap"}},
		Newest: &farsidev1.Point{
			Position: &farsidev1.Position{Timeline: 1, Seq: 4711}, TimeNs: fakeTime, Accuracy: farsidev1.Accuracy_ACCURACY_EXACT,
		},
		Counters: &farsidev1.Counters{Writes: 99, BytesCaptured: 1 << 20},
		Settings: &farsidev1.AgentSettings{Points: &farsidev1.PointSchedule{FilesystemEveryMs: new(int64(3_600_000))}},
		Capture:  &farsidev1.CaptureStatus{Driver: "ebpf", Mode: "data"},
		Warnings: []*farsidev1.Notice{{Code: "overflow", Severity: farsidev1.Severity_SEVERITY_WARNING, Text: "the ring was full", TimeNs: fakeTime}},
	}
}

func (fakeServer) ListMachines(context.Context, *farsidev1.ListMachinesRequest) (*farsidev1.ListMachinesResponse, error) {
	return &farsidev1.ListMachinesResponse{Machines: []*farsidev1.Machine{fakeMachine()}}, nil
}

func (fakeServer) GetMachine(_ context.Context, r *farsidev1.GetMachineRequest) (*farsidev1.GetMachineResponse, error) {
	if r.GetMachine() != "web" {
		return nil, notFound(r.GetMachine())
	}
	return &farsidev1.GetMachineResponse{Machine: fakeMachine()}, nil
}

func (fakeServer) ProtectMachine(_ context.Context, r *farsidev1.ProtectMachineRequest) (*farsidev1.ProtectMachineResponse, error) {
	if p := r.GetPoints(); p != nil {
		if p.FilesystemEveryMs == nil || p.ApplicationEveryMs != nil || p.GetFilesystemEveryMs() < 10_000 {
			return nil, api.NewError(connect.CodeInvalidArgument, api.KindInvalid, fmt.Errorf("too often, or not what was said: %v", p))
		}
		return &farsidev1.ProtectMachineResponse{Machine: fakeMachine()}, nil
	}
	if len(r.GetDiskPaths()) == 0 || r.GetDiskPaths()[0] != "/dev/sda" {
		return nil, api.NewError(connect.CodeInvalidArgument, api.KindInvalid, errors.New("no such disk"))
	}
	return &farsidev1.ProtectMachineResponse{Machine: fakeMachine()}, nil
}

func (fakeServer) ListNodes(_ context.Context, r *farsidev1.ListNodesRequest) (*farsidev1.ListNodesResponse, error) {
	if r.GetPageToken() == "" { // two pages
		return &farsidev1.ListNodesResponse{NextPageToken: "2", Nodes: []*farsidev1.Node{{Name: "one", Role: farsidev1.Role_ROLE_AGENT, Online: true}}}, nil
	}
	return &farsidev1.ListNodesResponse{Nodes: []*farsidev1.Node{{Name: "two", Role: farsidev1.Role_ROLE_MASTER_TARGET}}}, nil
}

func (fakeServer) CreateToken(_ context.Context, r *farsidev1.CreateTokenRequest) (*farsidev1.CreateTokenResponse, error) {
	if r.GetTtlSeconds() > 30*24*3600 {
		return nil, api.NewError(connect.CodeInvalidArgument, api.KindInvalid, errors.New("30 days at most"))
	}
	return &farsidev1.CreateTokenResponse{Token: "fs1.secret", TokenId: "t1", ExpiresNs: fakeTime}, nil
}

func (fakeServer) ListPoints(context.Context, *farsidev1.ListPointsRequest) (*farsidev1.ListPointsResponse, error) {
	return &farsidev1.ListPointsResponse{
		Spans: []*farsidev1.Span{
			{
				Accuracy: farsidev1.Accuracy_ACCURACY_EXACT, First: &farsidev1.Position{Timeline: 1, Seq: 7},
				Last: &farsidev1.Position{Timeline: 1, Seq: 4711}, FirstTimeNs: fakeTime - 1e9, LastTimeNs: fakeTime,
			},
			{Accuracy: farsidev1.Accuracy_ACCURACY_EPOCH, Open: true, First: &farsidev1.Position{Timeline: 1, Seq: 1}, Last: &farsidev1.Position{Timeline: 1, Seq: 6}},
		},
		Tags: []*farsidev1.TagPoint{{Name: "nightly", Consistency: farsidev1.Consistency_CONSISTENCY_CRASH, Position: &farsidev1.Position{Timeline: 1, Seq: 99}, TimeNs: fakeTime}},
	}, nil
}

func (fakeServer) TagPoint(_ context.Context, r *farsidev1.TagPointRequest) (*farsidev1.TagPointResponse, error) {
	reached, detail := r.GetConsistency(), ""
	if r.GetName() == "hooked" {
		reached, detail = farsidev1.Consistency_CONSISTENCY_CRASH, "hook 50-postgresql failed"
	}
	return &farsidev1.TagPointResponse{Tag: &farsidev1.TagPoint{
		Name: r.GetName(), Consistency: reached, Detail: detail, Position: &farsidev1.Position{Timeline: 1, Seq: 100}, TimeNs: fakeTime,
	}}, nil
}

func (s fakeServer) OpenView(_ context.Context, r *farsidev1.OpenViewRequest) (*farsidev1.OpenViewResponse, error) {
	at := &farsidev1.Position{Timeline: 1, Seq: 4711}
	if p := r.GetSelector().GetPosition(); p != nil {
		at = p
	}
	if at.GetSeq() > 4711 {
		return nil, api.NewError(connect.CodeFailedPrecondition, api.KindNoPoint, errors.New("the newest point is 1:4711"))
	}
	return &farsidev1.OpenViewResponse{View: &farsidev1.View{
		Id: "v1", MachineName: "web", Writable: r.GetWritable(),
		Status: &farsidev1.ViewStatus{
			State: farsidev1.ViewState_VIEW_STATE_OPEN, Position: at, TimeNs: fakeTime, OpenMs: 1.5,
			Exports: []*farsidev1.Export{{DiskId: 1, Size: 3 << 20, Uris: []string{"nbd+unix:///x?socket=/nowhere", s.export}}},
		},
	}}, nil
}

func (fakeServer) CloseView(_ context.Context, r *farsidev1.CloseViewRequest) (*farsidev1.CloseViewResponse, error) {
	if r.GetView() != "v1" {
		return nil, notFound(r.GetView())
	}
	return &farsidev1.CloseViewResponse{View: &farsidev1.View{Id: "v1"}}, nil
}

func (s fakeServer) ListViews(ctx context.Context, _ *farsidev1.ListViewsRequest) (*farsidev1.ListViewsResponse, error) {
	r, err := s.OpenView(ctx, &farsidev1.OpenViewRequest{})
	return &farsidev1.ListViewsResponse{Views: []*farsidev1.View{r.GetView()}}, err
}

// fakeDisk is 3 MiB with data in the middle one.
type fakeDisk struct{ *bytes.Reader }

func (fakeDisk) WriteAt([]byte, int64) (int, error) { return 0, errors.ErrUnsupported }
func (fakeDisk) Flush() error                       { return nil }

// startFake starts a fakeServer and returns the directory with its context file.
func startFake(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	content := make([]byte, 3<<20)
	copy(content[1<<20:], bytes.Repeat([]byte("far side "), 1000))
	if err := os.WriteFile(filepath.Join(dir, "disk"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	disk, err := nbd.NewServer(nbd.Config{Lookup: func(string) (*nbd.Export, error) {
		return &nbd.Export{Device: fakeDisk{bytes.NewReader(content)}, ReadOnly: true}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "nbd.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go disk.Serve(l)
	t.Cleanup(func() { disk.Close() })

	ca, err := transport.NewCA(time.Now)
	if err != nil {
		t.Fatal(err)
	}
	id, err := ca.Identity(transport.Peer{Role: transport.RoleConfigServer, Node: dr.NewNodeID()})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(farsidev1connect.NewFarsideServiceHandler(fakeServer{export: "nbd+unix:///disk?socket=" + socket}))
	tl, err := tls.Listen("tcp", "127.0.0.1:0", id.OpenServerConfig())
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	go server.Serve(tl)
	t.Cleanup(func() { server.Close() })
	text, err := api.Context{
		Servers: []string{tl.Addr().String()}, Token: "token",
		CA: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Authorities()[0]})),
	}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "context.json"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestParseSelector(t *testing.T) {
	for text, want := range map[string]string{
		"latest":                      `latest:true`,
		"1:4711":                      `position:{timeline:1 seq:4711}`,
		"tag:before 5:00":             `tag:"before 5:00"`,
		"2026-11-23T08:00:00.000001Z": `time_ns:1795420800000001000`,
		"2026-11-23T09:00:00+01:00":   `time_ns:1795420800000000000`,
	} {
		s, err := parseSelector(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := string(bytes.ReplaceAll([]byte(s.String()), []byte("  "), []byte(" "))); got != want {
			t.Errorf("%s: got %s, want %s", text, got, want)
		}
	}
	for _, text := range []string{"", "tag:", "yesterday", "1:", ":1", "1:2:3", "-1:2", "2026-11-23"} {
		if s, err := parseSelector(text); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%q: got %v, %v", text, s, err)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 5 << 30: "5.0 GiB", 3 << 50: "3.0 PiB"} {
		if got := size(n); got != want {
			t.Errorf("%d: got %s, want %s", n, got, want)
		}
	}
}
