package confserver

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"farside/internal/api/farside/v1/farsidev1connect"
	"farside/internal/catalog"
	"farside/internal/dr"
	"farside/internal/transport"
)

// The roles of people, weakest first. A role may do all that a weaker one may.
const (
	roleViewer        = "viewer"
	roleOperator      = "operator"
	roleAdministrator = "administrator"
)

// rank orders the roles of people; 0 for none of them.
func rank(role string) int {
	return 1 + slices.Index([]string{roleViewer, roleOperator, roleAdministrator}, role)
}

// rule says who may make a call.
type rule struct {
	nodes  []string // with a certificate of one of these roles, or
	people string   // with a token of a user of at least this role, or
	anyone bool     // without: the call itself asks for proof
}

// access lists who may make each call. What is not listed, nobody may.
func access() map[string]rule {
	nodes := rule{nodes: []string{transport.RoleAgent, transport.RoleProcessServer, transport.RoleMasterTarget}}
	viewer, operator, administrator := rule{people: roleViewer}, rule{people: roleOperator}, rule{people: roleAdministrator}
	return map[string]rule{
		farsidev1connect.NodeServiceJoinProcedure:   {anyone: true},
		farsidev1connect.NodeServiceRenewProcedure:  nodes,
		farsidev1connect.NodeServiceWatchProcedure:  nodes,
		farsidev1connect.NodeServiceReportProcedure: nodes,

		farsidev1connect.FarsideServiceGetServerProcedure:              viewer,
		farsidev1connect.FarsideServiceListNodesProcedure:              viewer,
		farsidev1connect.FarsideServiceListMachinesProcedure:           viewer,
		farsidev1connect.FarsideServiceGetMachineProcedure:             viewer,
		farsidev1connect.FarsideServiceListPointsProcedure:             viewer,
		farsidev1connect.FarsideServiceListViewsProcedure:              viewer,
		farsidev1connect.FarsideServiceListGroupsProcedure:             viewer,
		farsidev1connect.FarsideServiceListGroupPointsProcedure:        viewer,
		farsidev1connect.FarsideServiceTagPointProcedure:               operator,
		farsidev1connect.FarsideServiceTagGroupProcedure:               operator,
		farsidev1connect.FarsideServiceOpenViewProcedure:               operator,
		farsidev1connect.FarsideServiceCloseViewProcedure:              operator,
		farsidev1connect.FarsideServiceIssueClientCertificateProcedure: operator,
		farsidev1connect.FarsideServiceCreateTokenProcedure:            administrator,
		farsidev1connect.FarsideServiceProtectMachineProcedure:         administrator,
		farsidev1connect.FarsideServiceSetGroupProcedure:               administrator,
		farsidev1connect.FarsideServiceDeleteGroupProcedure:            administrator,
		farsidev1connect.FarsideServiceUnprotectMachineProcedure:       administrator,
	}
}

// caller is who makes a call: a node or a user.
type caller struct {
	node catalog.Node
	user catalog.User
}

type callerKey struct{}

func callerOf(ctx context.Context) caller {
	c, _ := ctx.Value(callerKey{}).(caller)
	return c
}

// authenticate lets through who may make the call that the path names. It does so
// before the body is read.
func (s *server) authenticate(next http.Handler) http.Handler {
	rules := access()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rule, ok := rules[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		c, err := s.admit(r, rule)
		if err != nil {
			s.log.Warn("refused a call", "call", r.URL.Path, "from", r.RemoteAddr, "error", err)
			if werr := s.errors.Write(w, r, wireError(err)); werr != nil {
				s.log.Debug("can't answer a refused call", "error", werr)
			}
			return
		}
		if rule.anyone {
			r.Body = http.MaxBytesReader(w, r.Body, maxJoin)
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, c)))
	})
}

func (s *server) admit(r *http.Request, rule rule) (caller, error) {
	switch {
	case rule.anyone:
		return caller{}, nil
	case rule.people != "":
		return s.admitUser(r.Context(), r.Header.Get("Authorization"), rule.people)
	}
	return s.admitNode(r, rule.nodes)
}

func (s *server) admitNode(r *http.Request, roles []string) (caller, error) {
	peer, err := transport.PeerOfState(r.TLS)
	if err != nil {
		return caller{}, fmt.Errorf("this call needs a node's certificate: %w: %w", errNoCredentials, err)
	}
	// The connection may be older than the end of the certificate.
	if s.now().After(r.TLS.PeerCertificates[0].NotAfter) {
		return caller{}, fmt.Errorf("certificate of %s has expired: %w: %w", peer, errNoCredentials, dr.ErrDenied)
	}
	if !slices.Contains(roles, peer.Role) {
		return caller{}, fmt.Errorf("%s may not make this call: %w", peer, dr.ErrDenied)
	}
	var c caller
	err = s.catalog.Read(r.Context(), func(tx *catalog.Tx) (err error) {
		c.node, err = tx.Node(peer.Node)
		return err
	})
	if errors.Is(err, dr.ErrNotFound) || err == nil && (c.node.Role != peer.Role || c.node.Machine != peer.Machine) {
		return caller{}, fmt.Errorf("%s is no member here: %w", peer, dr.ErrDenied)
	}
	return c, err
}

// apiTokenPrefix begins the text of an API token: "fsk1." ID "." SECRET, the
// secret 256 random bits in base64.
const apiTokenPrefix = "fsk1."

func newAPIToken() (id, text string, hash []byte) {
	var secret [32]byte
	rand.Read(secret[:])
	id = dr.NewNodeID().String()
	sum := sha256.Sum256(secret[:])
	return id, apiTokenPrefix + id + "." + base64.RawURLEncoding.EncodeToString(secret[:]), sum[:]
}

func parseAPIToken(text string) (id string, hash []byte, err error) {
	rest, ok := strings.CutPrefix(text, apiTokenPrefix)
	id, secret, ok2 := strings.Cut(rest, ".")
	b, err := base64.RawURLEncoding.Strict().DecodeString(secret)
	if !ok || !ok2 || err != nil || len(b) != 32 {
		return "", nil, fmt.Errorf("malformed API token: %w", dr.ErrDenied)
	}
	sum := sha256.Sum256(b)
	return id, sum[:], nil
}

func (s *server) admitUser(ctx context.Context, authorization, least string) (caller, error) {
	text, ok := strings.CutPrefix(authorization, "Bearer ")
	if !ok {
		return caller{}, fmt.Errorf("this call needs an API token: %w: %w", errNoCredentials, dr.ErrDenied)
	}
	id, hash, err := parseAPIToken(text)
	if err != nil {
		return caller{}, fmt.Errorf("%w: %w", errNoCredentials, err)
	}
	var c caller
	var token catalog.APIToken
	err = s.catalog.Read(ctx, func(tx *catalog.Tx) (err error) {
		if token, err = tx.APIToken(id); err != nil {
			return err
		}
		c.user, err = tx.User(token.User)
		return err
	})
	switch {
	case errors.Is(err, dr.ErrNotFound), err == nil && subtle.ConstantTimeCompare(hash, token.Hash) != 1:
		return caller{}, fmt.Errorf("unknown API token: %w: %w", errNoCredentials, dr.ErrDenied)
	case err != nil:
		return caller{}, err
	case token.Expires != 0 && s.now().UnixNano() >= token.Expires:
		return caller{}, fmt.Errorf("API token has expired: %w: %w", errNoCredentials, dr.ErrDenied)
	case rank(c.user.Role) < rank(least):
		return caller{}, fmt.Errorf("user %q is %s, this call needs %s: %w", c.user.Name, c.user.Role, least, dr.ErrDenied)
	}
	return c, nil
}

// uuidOf writes 16 bytes as the other ids are written.
func uuidOf(b [16]byte) string { return dr.NodeID(b).String() }

// newUUID returns a random id for a thing that has no id type of its own.
func newUUID() string { return dr.NewNodeID().String() }

// checkUUID returns id in the form that the catalog uses.
func checkUUID(what, id string) (string, error) {
	u, err := dr.ParseNodeID(id)
	if err != nil || u.IsZero() {
		return "", fmt.Errorf("%s %q is not a UUID: %w", what, id, dr.ErrInvalid)
	}
	return u.String(), nil
}

// keyHash names a public key.
func keyHash(key []byte) []byte {
	sum := sha256.Sum256(key)
	return []byte(hex.EncodeToString(sum[:]))
}
