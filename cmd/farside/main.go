// Command farside is the one binary of Farside: every role and every tool.
//
// There is one file per verb: flags, wiring, output. What a verb does lies in internal. exit.go maps
// kinds of error to exit codes and hints, once. Verbs print for people, or with --json one JSON object
// (or array) on standard output; everything else goes to standard error. The first interrupt or SIGTERM
// cancels the context of the verb, which then cleans up; the second ends the process.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	go func() {
		<-ctx.Done()
		stop() // restores the default action, so that a second signal ends the process
	}()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run executes the command line and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	a := &app{out: stdout, err: stderr}
	root := newRoot(a)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	return a.report(ctx, err)
}
