// Package qemu captures the disks of a running QEMU guest from outside: nothing of
// ours runs in the guest. A block job of QEMU (blockdev-mirror, copy-mode=write-blocking,
// sync=none) repeats each write of the guest to a tap before the guest learns that it is
// done; what was there before is read through an NBD export of the same QEMU.
//
// Main types: [Guest] is a QEMU found by its QMP monitor; [Source], made by Guest.Open, is
// the capture.Source of some of its disks; [Monitor] speaks QMP.
//
// It keeps no copy of a disk, starts and stops no guest, and can't capture while QEMU does
// not run: then the Source ends with an error, and whoever opens the next one compares.
//
// # Why the stream is right
//
// QEMU writes to the image first, then to the tap, and then tells the guest. So the image may
// be ahead of the stream by writes that are in flight: those whose end the guest does not know.
// A power cut may or may not leave such a write on the disk, whole or in part, so a state
// that has some of it is one in which a power cut could have left the disks. Whatever
// completed before such a write was submitted is in the stream already. Therefore a bulk read of the
// image does no harm beside the stream, as with any other driver, and each position
// of the exact stream is a point.
//
// The writes in flight when a job begins are not repeated to the tap. Open has QEMU
// drain all of its disks afterwards, so they are on the image before anything is read.
//
// QEMU goes on without the tap when the connection breaks, since a guest must never
// wait for its replication. Then writes are missing. The kernel knows the end of a connection at
// once: it is looked for before each batch of events is handed over, and with the job's state before a sync
// ends ([Source.Verify]). What waits then is dropped, and the Source ends.
//
// # Concurrency
//
// A Guest and its Source are safe for concurrent use, within the rules of
// capture.Source. A Source owns the goroutines of its server and a watcher; Close waits for them.
package qemu
