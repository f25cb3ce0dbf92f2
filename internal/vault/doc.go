// Package vault keeps the whole past of one machine's disks: a base image per
// disk, a run of immutable segments of frames behind it, branches, and an index
// that finds any block at any position. docs/format/vault.md has the bytes,
// DESIGN.md the argument why a crash at any moment loses nothing that was
// acknowledged.
//
// Main types: Vault; Log, the append-only run of one timeline, into which a
// stream or a branch is written; State, all disks at a position, for reading;
// Cache, the memory that vaults share. Check proves a vault whole.
//
// The package doesn't decide how much of the past is kept (it folds to where it
// is told), doesn't serve disks to anyone (packages view and export do), and
// doesn't receive streams (package mastertarget does).
//
// # Concurrency
//
// All methods of Vault, Log and State are safe for concurrent use. A Log takes
// frames from one sender at a time: the order of concurrent Appends is theirs.
// The package starts no goroutine of its own; Pebble's end with Vault.Close.
package vault
