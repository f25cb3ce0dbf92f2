// Package mastertarget is the role at the secondary site that keeps the past of
// machines: it receives their streams from process servers into vaults, opens
// the views that are wanted, offers their disks over NBD, folds history that has
// left its window, and reports.
//
// Main types: Config, read by LoadConfig; Run, which is the role. Inside, server
// brings what is to what the assignment says, again and again; machine is a
// vault with its stream and its folding; openView is a view with its exports.
//
// It keeps no state of its own beside the vaults: after a restart the last
// assignment says which vaults and views there are, and a branch is found by
// its timeline. It chooses no recovery points and starts no machines.
//
// One goroutine reconciles; each connection has its own, each machine one that
// folds. All end before Run returns.
package mastertarget
