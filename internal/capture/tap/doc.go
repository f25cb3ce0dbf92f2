// Package tap captures the changes of disks by standing in front of them: an
// NBD server whose every write goes to the disk behind it and, in the same
// order, into the stream. It needs no kernel help and no root; it is also what
// QEMU's mirror writes to when a running guest is captured without an agent.
//
// Main types: [Tap] is the capture.Source; [Tap.Device] is a disk as its
// writers see it; [Backing] is what lies behind, [File] the usual one; [Open]
// puts files, a Tap and its NBD server together.
//
// It does not see changes that go around it, keeps its dirty set in memory
// only (after a restart the disks must be compared), and never makes a writer
// wait for the consumer: when the buffer is full it goes to bitmap mode.
//
// # Order
//
// A change takes four steps: (1) lock its range of its disk, (2) take its place
// in the stream of all disks, (3) change the backing, (4) unlock and answer.
//
//   - A change that completed before another was submitted did (2) before: its
//     events come first.
//   - Changes that overlap exclude each other from (1) to (4), so their order in
//     the stream is their order on the backing.
//   - (2) comes before (3): whoever read what a change wrote, and writes because
//     of it, comes after it in the stream.
//
// So each prefix of the stream is a state in which a power cut could have left
// the disks. A change that the backing refuses is in the stream already; what
// is really there then is read back and follows as another change, and its range is marked.
//
// # Concurrency
//
// Devices are called concurrently; one mutex orders the stream and is held for
// bookkeeping only, data is copied outside of it. Next is called by one
// goroutine at a time.
package tap
