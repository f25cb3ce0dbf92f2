// Package nbd speaks the Network Block Device protocol, both ends of it.
//
// Purpose: a replica is used through NBD (QEMU boots from it, nbdcopy and
// qemu-img read it, the kernel mounts it), so the server must be complete and
// must keep its promises: a FLUSH or a FUA write is answered only after the
// device's Flush returned, and an error is an answer, never a hang.
//
// Main types: [Server] offers what its Lookup function finds as [Export];
// [Device] is what it needs of a device, and the small interfaces beside it
// ([Zeroer], [Trimmer], [Mapper], ...) are what a device may do better.
// [Client] is the other end: it is a Device itself. [Errno] is an error as it
// stands on the wire.
//
// The server speaks fixed newstyle negotiation with STARTTLS, LIST, INFO, GO
// and EXPORT_NAME, structured replies with holes, the base:allocation context,
// and all commands but RESIZE. It does not speak the old style without
// options, nor extended (64 bit) headers.
//
// What it does not do: it opens no files, knows nothing of views, and decides
// nothing about who may see an export beyond the TLS settings it is given.
//
// Concurrency: Server and Client are safe for concurrent use. A device is
// called from many goroutines at once, up to Config.Workers per connection;
// the protocol orders nothing between requests that are in flight together.
// Memory is bounded by Config.Memory for all connections of a server.
package nbd
