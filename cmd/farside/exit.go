package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"farside/internal/dr"
)

// Exit codes; docs/cli.md and the help of the root command list them.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitDenied      = 4
	exitCorrupt     = 5
	exitUnavailable = 6
	exitExists      = 7
	exitUnsupported = 8
	exitInterrupted = 130
)

// kinds maps kinds of error to exit codes and to what a person may try; the first that fits counts.
var kinds = []struct {
	kind error
	code int
	hint string
}{
	{errUsage, exitUsage, `"farside help" lists the verbs, "farside VERB --help" their flags`},
	{context.Canceled, exitInterrupted, ""},
	{dr.ErrCorrupt, exitCorrupt, "keep a copy before you change anything; other points of the machine may be whole"},
	{dr.ErrVersion, exitCorrupt, "the file was written by a newer farside, or is none of its files"},
	{dr.ErrGap, exitCorrupt, ""},
	{dr.ErrNoPoint, exitNotFound, `"farside point list MACHINE" shows what can be opened`},
	{dr.ErrNotFound, exitNotFound, ""},
	{fs.ErrNotExist, exitNotFound, ""},
	{dr.ErrDenied, exitDenied, "check the token or certificate that you use"},
	{fs.ErrPermission, exitDenied, "this may need root"},
	{dr.ErrTimeline, exitDenied, "the machine was failed over; this side must stand down"},
	{dr.ErrFull, exitUnavailable, "free space, then try again"},
	{dr.ErrUnavailable, exitUnavailable, "is the configuration server running, and is its address right?"},
	{context.DeadlineExceeded, exitUnavailable, ""},
	{dr.ErrExists, exitExists, ""},
	{fs.ErrExist, exitExists, ""},
	{dr.ErrUnsupported, exitUnsupported, ""},
	{dr.ErrInvalid, exitUsage, ""},
}

// errUsage marks a command line that was not understood.
var errUsage = errors.New("usage")

// hinted carries advice for the person along with an error.
type hinted struct {
	error
	hint string
}

func (h hinted) Unwrap() error { return h.error }

// withHint adds advice that is better than the one of the error's kind.
func withHint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return hinted{err, fmt.Sprintf(format, args...)}
}

// exitCode is an error that another process has reported already; only its exit code is passed on.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// classify returns exit code and hint.
func classify(err error) (int, string) {
	if err == nil {
		return exitOK, ""
	}
	code, hint := exitFailure, ""
	for _, k := range kinds {
		if errors.Is(err, k.kind) {
			code, hint = k.code, k.hint
			break
		}
	}
	var h hinted
	if errors.As(err, &h) {
		hint = h.hint
	}
	return code, hint
}

// report prints err for a person and returns the exit code.
func (a *app) report(ctx context.Context, err error) int {
	if err != nil && !a.started {
		err = usage{err}
	}
	var passed exitCode
	if errors.As(err, &passed) {
		return int(passed)
	}
	code, hint := classify(err)
	if code == exitOK {
		return code
	}
	if ctx.Err() != nil {
		code, hint = exitInterrupted, "" // whatever failed, failed because of that
	}
	fmt.Fprintln(a.err, "farside:", err)
	if hint != "" {
		fmt.Fprintln(a.err, "hint:", hint)
	}
	return code
}

// usage makes an error one of usage without changing what it says.
type usage struct{ error }

func (usage) Is(target error) bool { return target == errUsage }
func (u usage) Unwrap() error      { return u.error }
