// Package scan captures without a hook in any kernel: it reads the disks from time to time,
// compares each block's hash with that of what was sent, and marks what differs. It works for files and block
// devices wherever Go does, also where nothing better exists.
//
// Main types: [Source] is the capture.Source (a capture.Verifier without data: it is always in
// bitmap mode); [Options] say how often and how fast.
//
// It sees no single write, keeps no order, and offers a point only for a moment for which it has
// proof. It takes no snapshots (VSS, LVM), freezes nothing, and does not outlive its process.
//
// # What is proven, and what is not
//
// A pass reads all blocks once. Say it began at T, when the consumer had taken everything over, and that every block
// had the hash of what the consumer had got of it. Then each block was the same at some moment before T and at some moment
// after T, so what the consumer has is the content at T:
//
//	consumer reads the block         T: the pass begins        the pass reads the block
//	──────────●──────────────────────────┼─────────────────────────────●──────►
//	          same hash                  the same then, too            same hash
//
// unless a block was changed and changed back around T, and nowhere else is a trace of that. No comparing finds that out.
// For databases and file systems, which count up in what they write, it doesn't happen; a block that toggles
// between two states can do it. That is the price of having no hook.
//
// If any block differed, there is no point: it is marked, and when it was read, another pass has to prove the next T.
// After Options.Tries such passes the scan gives up until the next cycle.
//
// # Which reads count as sent
//
// The table holds the hash of what ReadAt returned of a block that was handed out as dirty, or that was read for the first
// time. Other reads, like those of a compare, change nothing: if the consumer finds a difference then, it marks the block. A
// pass never changes the table. So the table never holds the hash of something that the consumer doesn't have and that is not
// marked either.
//
// # Memory
//
// 16 bytes per block of 64 KiB: 256 MiB for a terabyte. Up to Options.Memory of that is in memory, tables of larger disks are
// files (docs/format/scantable.md). Passes need 1 MiB.
//
// # Concurrency
//
// A Source owns one goroutine, which scans; Close waits for it. Its methods are safe for concurrent use.
package scan
