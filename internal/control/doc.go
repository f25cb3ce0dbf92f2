// Package control is a node's side of control: how it joins a deployment, learns
// what it is to do, tells what it does, and renews its certificate.
//
// Main types: Client, opened from a node's data directory; JoinOptions for Join,
// which makes such a directory. Watch hands over the whole desired state whenever it
// changes; Report tells the whole actual state again and again. Both go on through any
// absence of the configuration server: a node works by the last assignment that it
// knows, which is kept on disk.
//
// It does not know what an assignment means; the roles do. It keeps two small
// files, written through package transport and os, not vfs: they are no replicated data.
//
// A Client is safe for concurrent use. It starts no goroutine: Watch and Report
// are to be run by the caller, and return when their context ends.
package control
