package api_test

import (
	"context"
	"encoding/pem"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/api/farside/v1/farsidev1connect"
	"farside/internal/transport"
	"farside/internal/transport/transporttest"
)

func pemOf(authorities [][]byte) string {
	var text []byte
	for _, der := range authorities {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return string(text)
}

// service answers GetServer with the caller's credentials.
type service struct {
	farsidev1connect.UnimplementedFarsideServiceHandler
}

func (service) GetServer(ctx context.Context, _ *farsidev1.GetServerRequest) (*farsidev1.GetServerResponse, error) {
	info, _ := connect.CallInfoForHandlerContext(ctx)
	return &farsidev1.GetServerResponse{User: info.RequestHeader().Get("Authorization")}, nil
}

func (service) ListViews(context.Context, *farsidev1.ListViewsRequest) (*farsidev1.ListViewsResponse, error) {
	return nil, api.NewError(connect.CodeNotFound, api.KindNoPoint, errors.New("no such moment"))
}

// serve runs the service with an identity and returns its address.
func serve(t *testing.T, id *transport.Identity) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(farsidev1connect.NewFarsideServiceHandler(service{}))
	config := id.OpenServerConfig()
	config.NextProtos = []string{"h2", "http/1.1"}
	s := &http.Server{Handler: mux, TLSConfig: config}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.ServeTLS(ln, "", "")
	}()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
	return ln.Addr().String()
}

func client(t *testing.T, c api.Context) *api.Client {
	t.Helper()
	cl, err := api.NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cl.Close() })
	return cl
}

func TestClient(t *testing.T) {
	site, foreign := transporttest.NewSite(t, nil), transporttest.NewSite(t, nil)
	good := serve(t, site.Identity(transport.RoleConfigServer))
	poser := serve(t, site.Identity(transport.RoleProcessServer))
	ours := api.Context{Servers: []string{"127.0.0.1:1", good}, CA: pemOf(site.CA.Authorities()), Token: "secret"}
	c := client(t, ours)
	r, err := c.GetServer(t.Context(), &farsidev1.GetServerRequest{})
	if err != nil || r.GetUser() != "Bearer secret" {
		t.Errorf("%v, %v", r, err)
	}
	_, err = c.ListViews(t.Context(), &farsidev1.ListViewsRequest{})
	if api.ErrorKind(err) != api.KindNoPoint || api.ErrorText(err) != "no such moment" {
		t.Errorf("kind %q of %v", api.ErrorKind(err), err)
	}
	for name, change := range map[string]func(*api.Context){
		"foreign authority": func(c *api.Context) { c.CA = pemOf(foreign.CA.Authorities()) },
		"another role":      func(c *api.Context) { c.Servers = []string{poser} },
		"nobody":            func(c *api.Context) { c.Servers = []string{"127.0.0.1:1"} },
	} {
		bad := ours
		change(&bad)
		_, err := client(t, bad).GetServer(t.Context(), &farsidev1.GetServerRequest{})
		if api.ErrorKind(err) != api.KindUnavailable {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestContext(t *testing.T) {
	site := transporttest.NewSite(t, nil)
	good := api.Context{Servers: []string{"a:1", "[::1]:2"}, CA: pemOf(site.CA.Authorities()), Token: "t"}
	text, err := good.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "context.json")
	if _, err := api.LoadContext(name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	load := func(text string) (api.Context, error) {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return api.LoadContext(name)
	}
	got, err := load(string(text))
	if err != nil || got.Token != "t" || len(got.Servers) != 2 || got.CA != good.CA {
		t.Errorf("%v", err)
	}
	for what, old := range map[string][2]string{
		"unknown key": {`"token"`, `"tokem"`},
		"no port":     {"a:1", "a"},
		"no token":    {`"t"`, `""`},
		"header":      {`"t"`, `"t\r\nX: y"`},
		"CA":          {"BEGIN", "BEGAN"},
		"CA's bytes":  {"MII", "AAA"},
		"cut":         {"}", ""},
	} {
		if _, err := load(strings.Replace(string(text), old[0], old[1], 1)); !errors.Is(err, api.ErrContext) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, bad := range []api.Context{{}, {Servers: []string{"a:1"}, Token: "t"}} {
		if _, err := bad.Marshal(); !errors.Is(err, api.ErrContext) {
			t.Errorf("%+v: %v", bad, err)
		}
		if _, err := api.NewClient(bad); !errors.Is(err, api.ErrContext) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func TestErrorKind(t *testing.T) {
	if api.ErrorKind(nil) != "" || api.ErrorKind(errors.New("x")) != "" {
		t.Error("a kind of nothing")
	}
	if got := api.ErrorText(errors.New("x")); got != "x" {
		t.Errorf("text %q", got)
	}
	for code, want := range map[connect.Code]string{
		connect.CodeInvalidArgument: api.KindInvalid, connect.CodeNotFound: api.KindNotFound, connect.CodeAlreadyExists: api.KindExists,
		connect.CodePermissionDenied: api.KindDenied, connect.CodeUnauthenticated: api.KindDenied, connect.CodeDataLoss: api.KindCorrupt,
		connect.CodeResourceExhausted: api.KindFull, connect.CodeUnimplemented: api.KindUnsupported, connect.CodeUnavailable: api.KindUnavailable,
		connect.CodeDeadlineExceeded: api.KindTimeout, connect.CodeInternal: api.KindInternal,
	} {
		if got := api.ErrorKind(connect.NewError(code, errors.New("x"))); got != want {
			t.Errorf("%v: %q, want %q", code, got, want)
		}
	}
}

func TestDialer(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dial := func(d *api.Dialer) error {
		c, err := d.Dial(t.Context(), "tcp", "ignored:1")
		if err == nil {
			c.Close()
		}
		return err
	}
	if err := dial(api.NewDialer()); err == nil {
		t.Error("dialled nobody")
	}
	d := api.NewDialer("127.0.0.1:1")
	if err := dial(d); err == nil || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("%v", err)
	}
	d.Skip()
	d.SetServers(nil) // keeps what it knows
	if err := dial(d); err == nil {
		t.Error("nobody listens there")
	}
	d.SetServers([]string{"127.0.0.1:1", ln.Addr().String()})
	if err := dial(d); err != nil {
		t.Error(err)
	}
	d.Skip()
	if err := dial(d); err != nil {
		t.Error(err)
	}
}
