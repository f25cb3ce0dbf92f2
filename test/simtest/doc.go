// Package simtest runs whole deployments in one process, in the time of a
// testing/synctest bubble: agents on simulated kernels, process servers and master targets on
// simulated disks, over a simulated network. A history is a seed: it says what is written, what is
// asked for and what breaks. While it runs, and at its end, the promises of docs/guarantees.md are checked.
//
// Main types: World, a deployment; History, what happens to it; Step, one thing of that.
// Shrink finds the shortest part of a history that still fails.
//
// The configuration server is not part of it: a World hands out assignments itself. It is for tests only.
//
// Concurrency: a World belongs to one goroutine; the roles in it have their own, which end with it.
package simtest
