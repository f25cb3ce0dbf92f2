// Command loader runs the mixed load on the directory in FARSIDE_LOAD_DIR, as
// load.Start does, on a machine of its own: it prints each commit and ends when its
// standard input does. It is for tests, and for Linux.
package main
