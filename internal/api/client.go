package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"farside/internal/api/farside/v1/farsidev1connect"
)

// Client makes people's calls. Its methods are those of FarsideService; Close
// ends its connections.
type Client struct {
	farsidev1connect.FarsideServiceClient
	http *http.Client
}

// maxMessage bounds a reply, in bytes.
const maxMessage = 64 << 20

// configServerPrefix begins the identity in the certificate of every configuration server.
const configServerPrefix = "farside://config-server/"

// NewClient makes a client from a context. It does not connect yet. The error
// wraps ErrContext.
func NewClient(c Context) (*Client, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	roots, err := c.authorities()
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		DialContext:           NewDialer(c.Servers...).Dial,
		TLSClientConfig:       tlsConfig(roots),
		TLSHandshakeTimeout:   10 * time.Second,
		ForceAttemptHTTP2:     true,
		MaxIdleConnsPerHost:   4,
		IdleConnTimeout:       time.Minute,
		ExpectContinueTimeout: time.Second,
	}
	h := &http.Client{Transport: transport}
	service := farsidev1connect.NewFarsideServiceClient(h, BaseURL,
		connect.WithInterceptors(bearer(c.Token)), connect.WithReadMaxBytes(maxMessage))
	return &Client{FarsideServiceClient: service, http: h}, nil
}

// Close ends the client's idle connections.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// tlsConfig trusts configuration servers of the authority, whatever their host is called.
func tlsConfig(roots *x509.CertPool) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // verified below: by authority and role, not by host name
		VerifyConnection: func(s tls.ConnectionState) error {
			between := x509.NewCertPool()
			for _, c := range s.PeerCertificates[1:] {
				between.AddCert(c)
			}
			leaf := s.PeerCertificates[0]
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between}); err != nil {
				return fmt.Errorf("verify configuration server: %w", err)
			}
			for _, u := range leaf.URIs {
				if s := u.String(); len(s) > len(configServerPrefix) && s[:len(configServerPrefix)] == configServerPrefix {
					return nil
				}
			}
			return errors.New("verify configuration server: its certificate is not one of a configuration server")
		},
	}
}

// bearer adds a token to every call.
func bearer(token string) connect.UnaryInterceptorFunc {
	return func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			req.Header().Set("Authorization", "Bearer "+token)
			return next(ctx, req)
		}
	}
}
