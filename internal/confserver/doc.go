// Package confserver is the configuration server: it keeps what should be in a
// catalog, tells each node its part, collects what is, lets nodes and people in, and
// answers people's questions.
//
// Main types: Config is its strict YAML file, Run runs it. Inside, assign and
// describe are pure: what a node should do, and what state a machine is in, follow from
// rows, reports and the time alone.
//
// It carries no replicated data and no node waits for it to replicate. It
// stores nothing outside the catalog but its CA key (ca.pem) and the context file that it
// writes for its first administrator (admin.json).
//
// Calls run concurrently; what they share is the catalog, whose writes exclude
// each other, and a cache of the nodes' last reports under a mutex.
package confserver
