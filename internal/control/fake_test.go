package control_test

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/api/farside/v1/farsidev1connect"
	"farside/internal/control"
	"farside/internal/transport"
	"farside/internal/transport/transporttest"
)

// fake is a configuration server that does what a test says.
type fake struct {
	farsidev1connect.UnimplementedNodeServiceHandler
	t    *testing.T
	site *transporttest.Site
	addr string
	node *transport.Identity // the node that it expects

	mu struct {
		sync.Mutex
		assignment *farsidev1.Assignment
		changed    chan struct{}
		fail       error // of every call
		reports    []*farsidev1.Report
		peers      []time.Time // when the certificates of Watch calls were issued
		renewals   int
	}
}

func newFake(t *testing.T, now func() time.Time) *fake {
	f := &fake{t: t, site: transporttest.NewSite(t, now)}
	f.mu.changed = make(chan struct{})
	f.node = f.site.Identity(transport.RoleProcessServer)
	f.addr = f.listen("127.0.0.1:0")
	return f
}

// listen serves at an address until the test ends.
func (f *fake) listen(addr string) string {
	f.t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		f.t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(farsidev1connect.NewNodeServiceHandler(f))
	tls := f.site.Identity(transport.RoleConfigServer).ServerConfig(transport.RoleProcessServer)
	tls.NextProtos = []string{"h2", "http/1.1"}
	s := &http.Server{TLSConfig: tls, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.mu.peers = append(f.mu.peers, r.TLS.PeerCertificates[0].NotAfter)
		f.mu.Unlock()
		mux.ServeHTTP(w, r)
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.ServeTLS(ln, "", "")
	}()
	f.t.Cleanup(func() {
		s.Close()
		<-done
	})
	return ln.Addr().String()
}

// dir makes the node's data directory, as Join would.
func (f *fake) dir(servers ...string) string {
	f.t.Helper()
	dir := filepath.Join(f.t.TempDir(), "node")
	if err := f.node.Save(dir); err != nil {
		f.t.Fatal(err)
	}
	first := f.work(0, "first")
	first.ConfigServers, first.Work = servers, nil
	if err := control.SaveAssignment(dir, first); err != nil {
		f.t.Fatal(err)
	}
	return dir
}

// work makes an assignment that can be told from others by the name of a machine.
func (f *fake) work(revision uint64, name string) *farsidev1.Assignment {
	return &farsidev1.Assignment{
		Revision: revision, NodeId: f.node.Peer().Node.String(), Authorities: f.site.CA.Authorities(),
		Work: &farsidev1.Assignment_ProcessServer{ProcessServer: &farsidev1.ProcessServerAssignment{
			Streams: []*farsidev1.Stream{{MachineName: name}},
		}},
	}
}

func nameOf(a *farsidev1.Assignment) string {
	if s := a.GetProcessServer().GetStreams(); len(s) > 0 {
		return s[0].GetMachineName()
	}
	return ""
}

func (f *fake) set(a *farsidev1.Assignment) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.assignment = a
	close(f.mu.changed)
	f.mu.changed = make(chan struct{})
}

func (f *fake) failWith(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.fail = err
	close(f.mu.changed)
	f.mu.changed = make(chan struct{})
}

// Watch implements the call.
func (f *fake) Watch(ctx context.Context, r *farsidev1.WatchRequest) (*farsidev1.WatchResponse, error) {
	for {
		f.mu.Lock()
		a, changed, err := f.mu.assignment, f.mu.changed, f.mu.fail
		f.mu.Unlock()
		if err != nil {
			return nil, err
		}
		if a != nil && a.GetRevision() != r.GetRevision() {
			return &farsidev1.WatchResponse{Assignment: a}, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond): // short, so that renewal is looked at often
			return &farsidev1.WatchResponse{}, nil
		}
	}
}

// fakeTime is what the clock of the server says: another time than this machine's.
const fakeTime = int64(1e18)

// Report implements the call.
func (f *fake) Report(_ context.Context, r *farsidev1.ReportRequest) (*farsidev1.ReportResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.fail != nil {
		return nil, f.mu.fail
	}
	f.mu.reports = append(f.mu.reports, r.GetReport())
	return &farsidev1.ReportResponse{ServerTimeNs: fakeTime}, nil
}

// Renew implements the call.
func (f *fake) Renew(_ context.Context, r *farsidev1.RenewRequest) (*farsidev1.RenewResponse, error) {
	chain, err := f.site.CA.Issue(r.GetCsr(), f.node.Peer(), transport.NodeLifetime)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.fail != nil {
		return nil, f.mu.fail
	}
	f.mu.renewals++
	return &farsidev1.RenewResponse{CertificateChain: chain, Authorities: f.site.CA.Authorities()}, nil
}

func (f *fake) count() (reports, renewals int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.mu.reports), f.mu.renewals
}

func (f *fake) lastReport() *farsidev1.Report {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.mu.reports) == 0 {
		return nil
	}
	return f.mu.reports[len(f.mu.reports)-1]
}

func unavailable() error {
	return api.NewError(connect.CodeUnavailable, api.KindUnavailable, context.DeadlineExceeded)
}
