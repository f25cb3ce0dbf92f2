package confserver

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
	"farside/internal/dr"
	"farside/internal/transport"
	"farside/internal/transport/transporttest"
)

// procedures lists every call of the schema.
func procedures() []string {
	var all []string
	for _, file := range []protoreflect.FileDescriptor{farsidev1.File_farside_v1_node_proto, farsidev1.File_farside_v1_farside_proto} {
		for i := range file.Services().Len() {
			s := file.Services().Get(i)
			for k := range s.Methods().Len() {
				all = append(all, "/"+string(s.FullName())+"/"+string(s.Methods().Get(k).Name()))
			}
		}
	}
	return all
}

func TestEveryCallHasARule(t *testing.T) {
	rules := access()
	for _, p := range procedures() {
		r, ok := rules[p]
		if !ok {
			t.Errorf("%s has no rule", p)
		}
		if r.people != "" && rank(r.people) == 0 {
			t.Errorf("%s is for %q, which is no role", p, r.people)
		}
		delete(rules, p)
	}
	for p := range rules {
		t.Errorf("rule for %s, which is no call", p)
	}
}

// credentials are one way to make calls.
type credentials struct {
	name  string
	token string // of a person
	id    *transport.Identity
	may   func(rule) bool
	code  string // of the refusal
}

// post makes a call with an empty JSON message, as curl would.
func post(t *testing.T, s *site, c credentials, path string) (status int, code string) {
	t.Helper()
	config := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	if c.id != nil {
		config = c.id.ClientConfig(transport.RoleConfigServer)
	}
	tr := &http.Transport{TLSClientConfig: config}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+s.config.Listen+path, strings.NewReader(`{}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	res, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return 0, "no connection"
	}
	defer res.Body.Close()
	var answer struct{ Code string }
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusOK && res.StatusCode != http.StatusNotFound {
		if err := json.Unmarshal(body, &answer); err != nil {
			t.Errorf("%s: status %d, body %q", path, res.StatusCode, body)
		}
	}
	return res.StatusCode, answer.Code
}

// TestAccess makes each call with each kind of credentials.
func TestAccess(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	agent, process := s.join(transport.RoleAgent, "a"), s.join(transport.RoleProcessServer, "p")
	gone := s.join(transport.RoleMasterTarget, "gone")
	s.stop()
	tokens := map[string]string{}
	s.edit(func(tx *catalog.Tx) error {
		for _, role := range []string{roleViewer, roleOperator, roleAdministrator, "clown"} {
			id, text, hash := newAPIToken()
			u := catalog.User{ID: role, Name: role, Role: role}
			err := errors.Join(tx.AddUser(u), tx.AddAPIToken(catalog.APIToken{ID: id, User: role, Hash: hash}))
			if err != nil {
				return err
			}
			tokens[role] = text
		}
		id, text, hash := newAPIToken()
		tokens["expired"] = text
		return errors.Join(tx.RemoveNode(gone.id.Peer().Node, 1),
			tx.AddAPIToken(catalog.APIToken{ID: id, User: roleAdministrator, Hash: hash, Expires: time.Now().UnixNano() - 1}))
	})
	s.start()
	_, unknown, _ := newAPIToken()
	forged := tokens[roleViewer][:len(tokens[roleViewer])-4] + "AAAA"
	foreign := transporttest.NewSite(t, nil)
	spy := foreign.Identity(transport.RoleAgent)
	trusted, err := transport.LoadIdentity(agent.dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := spy.Trust(trusted.Authorities()); err != nil {
		t.Fatal(err)
	}
	people := func(role string) func(rule) bool {
		return func(r rule) bool { return r.people != "" && rank(role) >= rank(r.people) }
	}
	node := func(r rule) bool { return r.nodes != nil }
	nobody := func(rule) bool { return false }

	for _, c := range []credentials{
		{"nothing", "", nil, nobody, "unauthenticated"},
		{"garbage token", "hello", nil, nobody, "unauthenticated"},
		{"unknown token", unknown, nil, nobody, "unauthenticated"},
		{"forged token", forged, nil, nobody, "unauthenticated"},
		{"expired token", tokens["expired"], nil, nobody, "unauthenticated"},
		{"token of an unknown role", tokens["clown"], nil, nobody, ""},
		{"viewer", tokens[roleViewer], nil, people(roleViewer), ""},
		{"operator", tokens[roleOperator], nil, people(roleOperator), ""},
		{"administrator", tokens[roleAdministrator], nil, people(roleAdministrator), ""},
		{"agent", "", agent.id, node, ""},
		{"process server", "", process.id, node, ""},
		{"removed node", "", gone.id, nobody, ""},
		{"foreign certificate", "", spy, nobody, "no connection"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for path, r := range access() {
				status, code := post(t, s, c, path)
				if c.code == "no connection" {
					if status != 0 {
						t.Errorf("%s: status %d", path, status)
					}
					continue
				}
				refused := code == "unauthenticated" || code == "permission_denied"
				if may := r.anyone || c.may(r); !r.anyone && may == refused {
					t.Errorf("%s: code %q, may %v", path, code, may)
				}
				if refused && c.code != "" && code != c.code {
					t.Errorf("%s: refused with %q, want %q", path, code, c.code)
				}
			}
		})
	}
	if status, _ := post(t, s, credentials{token: tokens[roleAdministrator]}, "/farside.v1.FarsideService/Nothing"); status != http.StatusNotFound {
		t.Errorf("unknown call: status %d", status)
	}
}

func TestExpiredCertificate(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.join(transport.RoleProcessServer, "p")
	if _, err := n.Watch(t.Context(), &farsidev1.WatchRequest{}); err != nil {
		t.Fatal(err)
	}
	s.clock.advance(transport.NodeLifetime + time.Minute)
	// The connection that is open does not outlive the certificate.
	_, err := n.Watch(t.Context(), &farsidev1.WatchRequest{})
	wantKind(t, "expired", err, "denied")
}

func TestGarbageBodies(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.join(transport.RoleProcessServer, "p")
	tr := &http.Transport{TLSClientConfig: n.id.ClientConfig(transport.RoleConfigServer)}
	defer tr.CloseIdleConnections()
	for _, body := range [][]byte{nil, []byte("hello"), bytes.Repeat([]byte{0xff}, 1<<20), []byte(`{"report":`), bytes.Repeat([]byte("a"), maxRequest+1)} {
		for _, path := range procedures()[:4] {
			for _, kind := range []string{"application/json", "application/proto", "application/grpc", "text/html"} {
				if len(body) > 1<<20 && (kind != "application/proto" || !strings.HasSuffix(path, "Report")) {
					continue
				}
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+s.config.Listen+path, bytes.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("Content-Type", kind)
				res, err := (&http.Client{Transport: tr, Timeout: 200 * time.Millisecond}).Do(req)
				if err != nil {
					continue // an empty Watch waits
				}
				res.Body.Close()
				if res.StatusCode >= 500 && res.StatusCode != http.StatusNotImplemented {
					t.Errorf("%s with %d bytes of %s: status %d", path, len(body), kind, res.StatusCode)
				}
			}
		}
	}
	if _, err := s.GetServer(t.Context(), &farsidev1.GetServerRequest{}); err != nil {
		t.Error(err)
	}
}

func TestParseAPIToken(t *testing.T) {
	id, text, hash := newAPIToken()
	gotID, gotHash, err := parseAPIToken(text)
	if err != nil || gotID != id || !bytes.Equal(gotHash, hash) {
		t.Errorf("%q: %q, %v", text, gotID, err)
	}
	for _, bad := range []string{"", "fsk1.", "fsk1.x.y", text + "A", text[:len(text)-2], "fsk2" + text[4:]} {
		if _, _, err := parseAPIToken(bad); !errors.Is(err, dr.ErrDenied) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// TestSecurityDocument: the table of docs/security.md says what access says.
func TestSecurityDocument(t *testing.T) {
	text, err := os.ReadFile("../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]string{}
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(line, "|")
		if len(cells) != 4 || !strings.Contains(cells[1], "Service: ") {
			continue
		}
		service, calls, _ := strings.Cut(strings.TrimSpace(cells[1]), ": ")
		for _, call := range strings.Split(calls, ", ") {
			documented["/farside.v1."+service+"/"+call] = strings.TrimSpace(cells[2])
		}
	}
	for path, r := range access() {
		want := r.people
		switch {
		case r.anyone:
			want = "anyone with a valid join token"
		case r.nodes != nil:
			want = strings.Join(r.nodes, ", ") + ", for themselves alone"
		}
		if documented[path] != want {
			t.Errorf("%s: the document says %q, the code %q", path, documented[path], want)
		}
		delete(documented, path)
	}
	for path := range documented {
		t.Errorf("the document has %s, which is no call", path)
	}
}
