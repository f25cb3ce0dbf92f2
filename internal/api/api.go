// Package api is the schema of the configuration server and what callers need to
// use it: the protobuf messages and Connect services generated from
// farside/v1/*.proto, clients, and the mapping between the kinds of error of the
// domain and those of the wire.
//
// Main types: Client (people's calls), Context (where the server is and how to
// prove oneself: the file admin.json), Reason (the kind of an error).
//
// It does not know certificates of nodes (transport does) nor what a call means
// (confserver does). Everything here is safe for concurrent use.
package api

//go:generate ./generate.sh
