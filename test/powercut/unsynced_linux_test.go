package powercut

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestMain is also the program that starts a role whose fsync does nothing, and the one that reads a catalog.
func TestMain(m *testing.M) {
	if path := os.Getenv("POWERCUT_CATALOG"); path != "" {
		if err := readCatalog(context.Background(), path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if program := os.Getenv("POWERCUT_UNSYNCED"); program != "" {
		err := ignoreSync()
		if err == nil {
			err = syscall.Exec(program, append([]string{program}, os.Args[1:]...), os.Environ())
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// withoutSync returns a program like the one at path, but that role runs with fsync and fdatasync that do nothing and
// say that all is well.
func withoutSync(t *testing.T, path, role string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(t.TempDir(), "unsynced")
	text := fmt.Sprintf("#!/bin/sh\nif [ \"$1\" = %s ]; then export POWERCUT_UNSYNCED=%s; exec %s \"$@\"; fi\nexec %s \"$@\"\n", role, path, self, path)
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	return script
}

// ignoreSync lets the kernel answer fsync and fdatasync of this process, and of what it becomes, with success.
func ignoreSync() error {
	runtime.LockOSThread()
	load := uint16(unix.BPF_LD | unix.BPF_W | unix.BPF_ABS)
	equal := uint16(unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K)
	answer := uint16(unix.BPF_RET | unix.BPF_K)
	filter := []unix.SockFilter{
		{Code: load, K: 0}, // the number of the call
		{Code: equal, Jt: 2, K: uint32(unix.SYS_FSYNC)},
		{Code: equal, Jt: 1, K: uint32(unix.SYS_FDATASYNC)},
		{Code: answer, K: unix.SECCOMP_RET_ALLOW},
		{Code: answer, K: unix.SECCOMP_RET_ERRNO},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("ignore fsync: %w", err)
	}
	_, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog)))
	if e != 0 {
		return fmt.Errorf("ignore fsync: %w", e)
	}
	return nil
}
