// Package catalog keeps the desired state of a deployment, and what its nodes
// reported last, in an SQL database: SQLite in one file, brought up to date by
// embedded migrations.
//
// Main types: Catalog is the database; Tx is one transaction on it, with a method
// per question; the nouns (Node, Machine, Disk, View, Tag, JoinToken, User) are plain rows.
//
// It decides nothing: what may be changed, what follows from a row, and what a
// report means are confserver's business. Reports and assignments are opaque to it. The
// database file belongs to SQLite, so it is not accessed through vfs.
//
// A Catalog is safe for concurrent use: one transaction writes at a time, many
// read beside it, each from one consistent state. A Tx is of one goroutine.
package catalog
