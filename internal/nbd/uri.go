package nbd

import (
	"fmt"
	"net"
	"net/url"
	"strings"
)

// DefaultPort is the TCP port registered for NBD.
const DefaultPort = "10809"

// URI says where an export is. Its text has one of the forms
//
//	nbd://host:port/name            nbds://host:port/name          (TLS)
//	nbd+unix:///name?socket=PATH    nbds+unix:///name?socket=PATH  (TLS)
type URI struct {
	Network string // "tcp" or "unix"
	Address string // host:port or path
	Name    string // of the export, may be ""
	TLS     bool
}

// ParseURI reads the text of a URI.
func ParseURI(s string) (URI, error) {
	u, err := url.Parse(s)
	if err != nil {
		return URI{}, fmt.Errorf("parse nbd uri: %w", err)
	}
	out := URI{Name: strings.TrimPrefix(u.Path, "/")}
	scheme, unix := strings.CutSuffix(u.Scheme, "+unix")
	switch scheme {
	case "nbd":
	case "nbds":
		out.TLS = true
	default:
		return URI{}, fmt.Errorf("parse nbd uri %q: unknown scheme %q", s, u.Scheme)
	}
	if unix {
		out.Network, out.Address = "unix", u.Query().Get("socket")
		if out.Address == "" || u.Host != "" {
			return URI{}, fmt.Errorf("parse nbd uri %q: want a socket and no host", s)
		}
		return out, nil
	}
	port := u.Port()
	if port == "" {
		port = DefaultPort
	}
	if u.Hostname() == "" {
		return URI{}, fmt.Errorf("parse nbd uri %q: no host", s)
	}
	out.Network, out.Address = "tcp", net.JoinHostPort(u.Hostname(), port)
	return out, nil
}

// String returns the text that ParseURI reads.
func (u URI) String() string {
	v := url.URL{Scheme: "nbd", Host: u.Address, Path: "/" + u.Name}
	if u.TLS {
		v.Scheme = "nbds"
	}
	if u.Network == "unix" {
		v.Scheme += "+unix"
		v.Host = ""
		// Slashes stay readable; other tools take them so.
		v.RawQuery = "socket=" + strings.ReplaceAll(url.QueryEscape(u.Address), "%2F", "/")
		return v.Scheme + "://" + v.EscapedPath() + "?" + v.RawQuery
	}
	return v.String()
}
