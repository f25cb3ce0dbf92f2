package main

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
)

// app is what every verb shares: where to print and how.
type app struct {
	out, err io.Writer
	json     bool
	context  string // file, or "" for the default
	// started: the command line was understood; errors from here on are not of usage.
	started bool
}

// print writes v as JSON if the user asked for that, else lets human write.
func (a *app) print(v any, human func(w io.Writer)) error {
	if !a.json {
		human(a.out)
		return nil
	}
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("print result: %w", err)
	}
	_, err = fmt.Fprintf(a.out, "%s\n", b)
	return err
}

// table writes rows under a header, in columns.
func table(w io.Writer, header string, rows func(row func(format string, args ...any))) {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, header)
	rows(func(format string, args ...any) { fmt.Fprintf(tw, format+"\n", args...) })
	tw.Flush()
}
