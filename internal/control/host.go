package control

import (
	"os"
	"runtime"

	farsidev1 "farside/internal/api/farside/v1"
)

// Host describes the machine that the process runs on, as far as it can be told.
func Host() *farsidev1.HostInfo {
	h := &farsidev1.HostInfo{Os: runtime.GOOS, Arch: runtime.GOARCH, Cpus: int32(runtime.NumCPU())}
	h.Hostname, _ = os.Hostname() // unknown stays empty
	fillHost(h)
	return h
}
