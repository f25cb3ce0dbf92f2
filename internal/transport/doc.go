// Package transport says who is who on the network, and connects them: the
// certificate authority of a deployment, the identity of a node, mutual TLS 1.3
// dialling and listening, join tokens, and an in-memory pipe for tests.
//
// Main types: CA issues certificates. Identity is a node's key, certificate and
// trust, which can be replaced while connections run. Peer is what a certificate
// says of its holder: role and ids, never a host name. Token lets a node join.
//
// It does not know what a peer may do beyond its role (the roles ask their
// assignment) and speaks no protocol of its own.
//
// All types are safe for concurrent use. A Listener owns a goroutine per
// handshake and waits for them in Close.
//
// The files of an identity are small, private and not part of the replicated
// data: they are read and written through package os, not vfs.
package transport
