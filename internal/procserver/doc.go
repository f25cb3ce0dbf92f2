// Package procserver is the role that stands between the agents of a site and
// the WAN: it receives their streams, compresses and spools them, and forwards
// them to master targets.
//
// Main types: Config, the configuration file; Run, the role. Within: stream, one
// machine's spool with the connection on each side; server, all streams of an
// assignment.
//
// What an agent is told is stored has been synced to the spool; only what is
// synced is forwarded. A full spool holds the agent back and never drops a frame.
// The role keeps no history, makes no views, and re-orders nothing.
//
// Concurrency: Run owns all goroutines and waits for them.
package procserver
