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
