package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"farside/internal/api"
	"farside/internal/dr"
)

// contextFile returns the file that says which configuration server to call, and how it was chosen.
func (a *app) contextFile() string {
	if a.context != "" {
		return a.context
	}
	if name := os.Getenv(api.ContextVariable); name != "" {
		return name
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "farside.json"
	}
	return filepath.Join(dir, "farside", "context.json")
}

// call makes a client, lets fn use it, and turns the API's errors into those of the domain.
func (a *app) call(ctx context.Context, fn func(ctx context.Context, c *api.Client) error) error {
	name := a.contextFile()
	c, err := api.LoadContext(name)
	if errors.Is(err, fs.ErrNotExist) {
		return withHint(err, "name a context file with --context or %s; a configuration server writes admin.json into its data directory", api.ContextVariable)
	}
	if errors.Is(err, api.ErrContext) {
		return fmt.Errorf("%w: %w", err, dr.ErrInvalid)
	}
	if err != nil {
		return err
	}
	client, err := api.NewClient(c)
	if err != nil {
		return err
	}
	defer client.Close()
	return fromAPI(fn(ctx, client))
}

// remote is an error that the configuration server answered: its text, and the kind that it stands for.
type remote struct {
	text string
	kind error
	err  error
}

func (r remote) Error() string   { return r.text }
func (r remote) Unwrap() []error { return []error{r.kind, r.err} }

// fromAPI gives an error of a call the kind of the domain that it stands for.
func fromAPI(err error) error {
	kind := map[string]error{
		api.KindInvalid: dr.ErrInvalid, api.KindNotFound: dr.ErrNotFound, api.KindExists: dr.ErrExists,
		api.KindDenied: dr.ErrDenied, api.KindCorrupt: dr.ErrCorrupt, api.KindVersion: dr.ErrVersion,
		api.KindTimeline: dr.ErrTimeline, api.KindFull: dr.ErrFull, api.KindUnsupported: dr.ErrUnsupported,
		api.KindUnavailable: dr.ErrUnavailable, api.KindNoPoint: dr.ErrNoPoint, api.KindTimeout: dr.ErrUnavailable,
	}[api.ErrorKind(err)]
	if kind == nil {
		return err
	}
	return remote{api.ErrorText(err), kind, err}
}
