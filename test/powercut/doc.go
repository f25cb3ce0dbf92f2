// Package powercut cuts the power of a block device: it records what a file system sends to a disk and makes the
// states that the disk may be in after a cut at any moment, each of which can be mounted and judged.
//
// Main types: Image, the content of a disk, copied on write; Log, what was sent to a disk in its order; Replay, which
// makes the states from a log and a seed; Disk, a block device of this kernel over an Image (Linux: a loop device over
// a file served by FUSE).
//
// A legal state has every change that was sent before the last flush, and of those after it any subset, some torn between
// sectors of 512 bytes. Changes of one sector keep their order. A change counts as sent when it is recorded,
// which is before its sender is told: a change that is under way while a flush is asked for counts as covered, so a few
// legal states are never made, and no illegal one. Everything is kept in memory, within the bound of the Log.
// It is for tests only.
package powercut
