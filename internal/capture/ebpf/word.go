package ebpf

import "unsafe"

// word32 returns the first four bytes of p as a word that another processor may
// change; p is aligned to it.
func word32(p []byte) *uint32 { return (*uint32)(unsafe.Pointer(unsafe.SliceData(p[:4]))) }

// word64 is word32 for eight bytes.
func word64(p []byte) *uint64 { return (*uint64)(unsafe.Pointer(unsafe.SliceData(p[:8]))) }

// addressOf returns the address of p, which does not move: it is not on Go's heap.
func addressOf(p []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))) }

// words64 returns p, whose length is a multiple of eight, as words.
func words64(p []byte) []uint64 { return unsafe.Slice(word64(p), len(p)/8) }
