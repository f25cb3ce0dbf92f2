// Package nbdtest judges NBD servers with tools that others wrote: nbdinfo,
// nbdcopy, nbdsh, qemu-img, qemu-io and fio.
//
// Main functions: [Judge] runs all of them on an export, whatever is behind
// it; [NewCerts] makes the certificates that they need for TLS.
//
// It is for tests only, starts no server and judges no speed. Judge changes
// the export's content. One export can be judged by one test at a time.
package nbdtest
