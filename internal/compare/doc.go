// Package compare is how two sides find out where copies of a disk differ
// without sending them: a Request tells hashes of blocks, an Answer which of them
// differ. docs/format/compare.md describes both byte by byte.
//
// It does no I/O and decides nothing: the agent chooses what to ask and what to do
// about differences, the master target reads what it holds. Nothing here is safe
// for concurrent use.
package compare
