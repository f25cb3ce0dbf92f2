// Package quiesce makes the file systems on the captured disks stand still for a
// moment, and lets applications prepare for it, so that the moment can be marked
// as a point that needs no repair.
//
// Main types: Options, what is to stand still and how long anything may take;
// Session, which goes through Prepare (hooks, descriptors, watchdog, syncfs), Hold
// (everything is frozen), Held (it still is) and Release (thaw, hooks); Hooks, the
// directories of programs that prepare applications. RunWatchdog is the process
// that thaws when the agent can't. docs/consistency.md is the guide for users,
// DESIGN.md beside this file argues why nothing stays frozen.
//
// The package places no tags, talks to no network and writes to no file while
// anything is frozen; it freezes only mounted file systems, and only on Linux.
//
// Concurrency: a Session is used by one goroutine, except for Held, which any may
// call. Release must be called once for each Session.
package quiesce
