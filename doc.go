// Package farside is the root of the module and holds no code: its tests guard
// the architecture. They check the import table of docs/ARCHITECTURE.md against
// the sources and against the linter's configuration, and that every package
// has a package comment.
//
// The program is cmd/farside; everything it is made of lies in internal.
package farside
