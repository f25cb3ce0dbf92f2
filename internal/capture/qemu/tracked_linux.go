package qemu

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// canTrack says that hungUp is exact on this system.
const canTrack = true

// hungUp reports whether c is closed here or the other side has closed or shut it down. A Unix socket knows
// that as soon as it happens, also while bytes that were sent before wait to be read.
func hungUp(c net.Conn) bool {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return true
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		for {
			_, err := unix.Poll(p, 0)
			if err == unix.EINTR {
				continue
			}
			gone = err != nil || p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
			return
		}
	})
	return err != nil || gone
}
