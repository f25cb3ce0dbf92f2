package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/nbd"
	"farside/internal/transport"
)

// dialExport connects to the first of the URIs that works from here: a Unix socket of this machine, or TLS with a
// short-lived certificate that the configuration server issues.
func dialExport(ctx context.Context, c *api.Client, uris []string) (*nbd.Client, error) {
	var errs []error
	for _, text := range uris {
		client, err := dialURI(ctx, c, text)
		if err == nil {
			return client, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("connect to the view: %w: %w", dr.ErrUnavailable, errors.Join(errs...))
}

func dialURI(ctx context.Context, c *api.Client, text string) (*nbd.Client, error) {
	uri, err := nbd.ParseURI(text)
	if err != nil {
		return nil, err
	}
	if uri.Network == "unix" {
		if _, err := os.Stat(uri.Address); err != nil {
			return nil, err
		}
	}
	if !uri.TLS {
		return nbd.Dial(ctx, text, nil)
	}
	id, err := clientIdentity(ctx, c)
	if err != nil {
		return nil, err
	}
	return nbd.Dial(ctx, text, id.ClientConfig(transport.RoleMasterTarget))
}

// clientIdentity gets a certificate for using exports.
func clientIdentity(ctx context.Context, c *api.Client) (*transport.Identity, error) {
	key, csr, err := transport.NewRequest()
	if err != nil {
		return nil, err
	}
	r, err := c.IssueClientCertificate(ctx, &farsidev1.IssueClientCertificateRequest{Csr: csr})
	if err != nil {
		return nil, fmt.Errorf("get a certificate for the view: %w", err)
	}
	return transport.NewIdentity(key, r.GetCertificateChain(), r.GetAuthorities(), time.Now)
}
