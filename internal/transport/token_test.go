package transport_test

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"farside/internal/dr"
	"farside/internal/transport"
)

func newToken(t testing.TB, addrs ...string) transport.Token {
	t.Helper()
	tok, err := transport.NewToken([32]byte{1, 2, 3}, transport.RoleAgent, addrs)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func TestTokenRoundTrip(t *testing.T) {
	for _, addrs := range [][]string{nil, {"127.0.0.1:7440"}, {"far.example:1", "[fe80::1]:2", strings.Repeat("ü", 100) + ":3"}} {
		want := newToken(t, addrs...)
		got, err := transport.ParseToken(" " + want.Text() + "\n")
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%v: %v, %v", addrs, got, err)
		}
	}
}

// TestTokenLayout pins the layout that docs/security.md describes.
func TestTokenLayout(t *testing.T) {
	tok := transport.Token{Role: transport.RoleMasterTarget, ConfigAddrs: []string{"a:1"}}
	for i := range tok.ID {
		tok.ID[i] = 0x11
	}
	for i := range tok.Secret {
		tok.Secret[i], tok.Authority[i] = 0x22, 0x33
	}
	const want = "fs1.ERERERERERERERERERERESIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiMzMzMzMzMzMzMzMzMzMzMzMzMzMzMzMzMzMzMzMzMzMDAQNhOjECDMxB"
	if got := tok.Text(); got != want {
		t.Errorf("token is\n%s, want\n%s", got, want)
	}
}

func TestTokenRefuses(t *testing.T) {
	good := newToken(t, "127.0.0.1:7440").Text()
	for name, tc := range map[string]struct {
		text string
		want error
	}{
		"empty":         {"", dr.ErrInvalid},
		"other":         {"hello", dr.ErrInvalid},
		"cut":           {good[:len(good)-3], dr.ErrInvalid},
		"shorter":       {good[:20], dr.ErrInvalid},
		"line end":      {good[:30] + "\n" + good[30:], dr.ErrInvalid},
		"altered":       {good[:30] + string(rune(good[30]^1)) + good[31:], dr.ErrInvalid},
		"later version": {"fs2." + good[4:], dr.ErrVersion},
		"huge":          {"fs1." + strings.Repeat("A", 10000), dr.ErrInvalid},
	} {
		_, err := transport.ParseToken(tc.text)
		if !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && len(tc.text) > 8 && strings.Contains(err.Error(), tc.text[4:]) {
			t.Errorf("%s: the error tells the token: %v", name, err)
		}
	}
	for _, role := range []string{"", "client", transport.RoleConfigServer} {
		if _, err := transport.NewToken([32]byte{}, role, nil); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("role %q: %v", role, err)
		}
	}
	for _, addr := range []string{"", "host", "host:", ":1", strings.Repeat("x", 300) + ":1"} {
		if _, err := transport.NewToken([32]byte{}, transport.RoleAgent, []string{addr}); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("address %q: %v", addr, err)
		}
	}
}

func TestTokenKeepsItsSecret(t *testing.T) {
	tok := newToken(t)
	for _, s := range []string{fmt.Sprint(tok), fmt.Sprintf("%+v", tok), fmt.Sprintf("%#v", tok)} {
		if strings.Contains(s, fmt.Sprintf("%x", tok.Secret)) || strings.Contains(s, fmt.Sprint(tok.Secret)) {
			t.Errorf("secret in %q", s)
		}
	}
	if tok.Hash() == tok.Secret {
		t.Error("hash is the secret")
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(newToken(f).Text())
	f.Add(newToken(f, "a:1", "[::1]:22").Text())
	f.Add("fs1.")
	f.Add("fs2.AAAA")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := transport.ParseToken(s)
		if err != nil {
			if !errors.Is(err, dr.ErrInvalid) && !errors.Is(err, dr.ErrVersion) {
				t.Fatalf("error of no kind: %v", err)
			}
			return
		}
		if tok.Text() != strings.TrimSpace(s) {
			t.Fatalf("%q is read as %q", s, tok.Text())
		}
	})
}

func FuzzParsePeer(f *testing.F) {
	f.Add(transport.Peer{Role: transport.RoleAgent, Node: dr.NewNodeID(), Machine: dr.NewMachineID()}.String())
	f.Add("farside://client/x")
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := transport.ParsePeer(s); err == nil && p.String() != s {
			t.Fatalf("%q is read as %q", s, p)
		}
	})
}
