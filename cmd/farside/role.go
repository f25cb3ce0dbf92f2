package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"farside/internal/dr"
)

// roleRun is what every role's package offers: read its configuration file, then run until ctx ends.
type roleRun[C any] struct {
	load func(path string) (C, error)
	run  func(ctx context.Context, c C, log *slog.Logger) error
}

// lazyGC is by how many percent the heap of a role may grow before it is collected.
const lazyGC = 300

// lazily makes a role collect garbage less often, unless GOGC is set: one that holds little memory
// for long and allocates as fast as data passes through it would else collect many times a second.
func lazily[C any](run func(context.Context, C, *slog.Logger) error) func(context.Context, C, *slog.Logger) error {
	return func(ctx context.Context, c C, log *slog.Logger) error {
		if os.Getenv("GOGC") == "" {
			defer debug.SetGCPercent(debug.SetGCPercent(lazyGC))
		}
		return run(ctx, c, log)
	}
}

// newRole makes the verb of a role. A role that is told to end ends without an error.
func newRole[C any](a *app, name, short string, r roleRun[C]) *cobra.Command {
	var file, level, format string
	cmd := &cobra.Command{
		Use:   name + " --config FILE",
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file == "" {
				return usage{errors.New("--config is missing")}
			}
			log, err := a.newLog(level, format)
			if err != nil {
				return err
			}
			c, err := r.load(file)
			if err != nil {
				return err
			}
			err = r.run(cmd.Context(), c, log)
			if cmd.Context().Err() != nil && errors.Is(err, context.Canceled) {
				return nil
			}
			return err
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration file (YAML)")
	cmd.Flags().StringVar(&level, "log-level", "info", "least level to log: debug, info, warn, error")
	cmd.Flags().StringVar(&format, "log-format", "text", "text or json")
	return cmd
}

// newLog makes the log of a role, on standard error.
func (a *app) newLog(level, format string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level: %w: %w", err, dr.ErrInvalid)
	}
	options := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(a.err, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(a.err, options)), nil
	}
	return nil, fmt.Errorf("--log-format %q: want text or json: %w", format, dr.ErrInvalid)
}
