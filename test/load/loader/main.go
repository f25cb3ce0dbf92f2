// Command loader runs the mixed load on the directory in FARSIDE_LOAD_DIR, as
// load.Start does, on a machine of its own: it prints each commit and ends when its
// standard input does. It is for tests.
package main

import (
	"fmt"
	"os"

	"farside/test/load"
)

func main() {
	load.Main()
	fmt.Fprintln(os.Stderr, "loader: FARSIDE_LOAD_DIR is not set")
	os.Exit(2)
}
