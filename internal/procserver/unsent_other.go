//go:build !linux

package procserver

import "net"

// limitUnsent does nothing where the system has no such bound.
func limitUnsent(net.Conn) {}
