//go:build linux

package quiesce

import (
	"fmt"
	"os"
	"testing"
)

// TestMain makes the test binary its own watchdog and its own agent.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case WatchdogVerb:
			if err := RunWatchdog(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		case agentVerb:
			freezeForTest(os.Args[2:])
			return
		}
	}
	os.Exit(m.Run())
}

// agentVerb makes the test binary freeze the disks that are named and wait to be killed.
const agentVerb = "freeze-for-test"
