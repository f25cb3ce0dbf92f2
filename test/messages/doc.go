// Package messages is a load that shows whether several disks were caught at one
// instant: processes, each with a log on a disk of its own, send each other numbered
// messages in a ring. Before a message leaves, its sending is in the sender's log,
// synced; when it has come, its receipt is written into the receiver's log and synced. So in any
// common state of all disks each message that was received was sent.
//
// Main types: Ring, the running processes; Log, what one disk says of it; Violations
// compares logs. The package runs only in tests and knows nothing of how the disks are copied.
package messages
