package procserver

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxUnsent is how many bytes may wait in the kernel for a slow link. What is there
// can't be folded any more; without a bound Linux takes megabytes, which is half a minute of a
// slow link. It is still more than what a fast one sends before a writer wakes up.
const maxUnsent = 256 << 10

// limitUnsent bounds what the kernel holds back of a connection. Where that can't be done,
// the newest points take longer to arrive.
func limitUnsent(conn net.Conn) {
	if c, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = c.NetConn()
	}
	c, ok := conn.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { // see above
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, maxUnsent)
	})
}
