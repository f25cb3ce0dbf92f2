package api

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
)

// Context says where a configuration server is, how to know that it is the right
// one, and how to prove oneself to it. The file holds a secret.
type Context struct {
	Servers []string `json:"servers"` // host:port, in the order to try
	CA      string   `json:"ca"`      // certificates of the authority, PEM
	Token   string   `json:"token"`   // API token of a person or program
}

// ContextVariable is the environment variable that names the context file.
const ContextVariable = "FARSIDE_CONTEXT"

// ErrContext says that a context file is malformed.
var ErrContext = errors.New("bad context")

// LoadContext reads a context file, such as the admin.json that a configuration
// server writes at its first start. The error wraps fs.ErrNotExist or ErrContext.
func LoadContext(name string) (Context, error) {
	f, err := os.Open(name)
	if err != nil {
		return Context{}, fmt.Errorf("load context: %w", err)
	}
	defer f.Close()
	var c Context
	dec := json.NewDecoder(f)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return Context{}, fmt.Errorf("load context %s: %w: %w", name, ErrContext, err)
	}
	if err := c.check(); err != nil {
		return Context{}, fmt.Errorf("load context %s: %w", name, err)
	}
	return c, nil
}

// Marshal returns the text of a context file.
func (c Context) Marshal() ([]byte, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("marshal context: %w", err)
	}
	return append(b, '\n'), nil
}

func (c Context) check() error {
	if len(c.Servers) == 0 {
		return fmt.Errorf("%w: no servers", ErrContext)
	}
	for _, s := range c.Servers {
		if host, port, err := net.SplitHostPort(s); err != nil || host == "" || port == "" {
			return fmt.Errorf("%w: server %q is not host:port", ErrContext, s)
		}
	}
	if c.Token == "" || strings.ContainsAny(c.Token, " \r\n") {
		return fmt.Errorf("%w: no token", ErrContext)
	}
	_, err := c.authorities()
	return err
}

func (c Context) authorities() (*x509.CertPool, error) {
	pool, n := x509.NewCertPool(), 0
	for rest := []byte(c.CA); ; n++ {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		cert, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: authority: %w", ErrContext, err)
		}
		pool.AddCert(cert)
	}
	if n == 0 {
		return nil, fmt.Errorf("%w: no authority", ErrContext)
	}
	return pool, nil
}
