// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// What the programs share with each other and with user space: constants that the
// loader sets, and the maps. Whatever changes here changes the layout of pinned
// captures (layoutVersion).
#ifndef FARSIDE_STATE_H
#define FARSIDE_STATE_H

#include "kernel.h"

#define MAX_DISKS 32
#define FLYING_BITS 15
#define MAX_FLYING (1 << FLYING_BITS)
#define PROBES 8
#define NEVER (~0u) // as control.settled
#define MAX_PIECES (1 << 17) // of a bio
#define MAX_MERGED (1 << 16) // bios of a request

#define READ_ONCE(x) (*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile typeof(x) *)&(x) = (v))
#define barrier_var(x) asm volatile("" : "+r"(x))

char licence[] SEC("license") = "Dual BSD/GPL";

// A watched range of sectors of a whole disk.
struct watch {
	u64 start, end;
	u64 word; // its first word of the bitmap
	u32 dev;
	u32 pad;
};

const volatile struct watch watches[MAX_DISKS];
const volatile u32 watch_count;
const volatile u32 block_shift;  // sectors of a bit of the bitmap, as a power of two
const volatile u32 max_bio;      // larger writes are not captured, bytes
const volatile u32 page_struct;  // sizeof(struct page)
const volatile u64 vmemmap_base; // of the array of struct page
const volatile u64 direct_base;  // where physical address 0 is mapped

struct control {
	u32 state;
	u32 settled;      // the state for which user space found nothing stale in flight
	u64 untracked_at; // when a bio last found no room in flying, ns since boot
	u64 unreadable;   // writes whose data could not be copied
	u64 failed;       // writes that the device refused
	u64 lost;         // completions that never came, seen by the reuse of a bio
	u64 late;         // stale completions after user space had given up on them
	u64 strangers;    // until then unknown completions may be of older writes, ns since boot
};

struct {
	map_uint(type, MAP_TYPE_ARRAY);
	map_uint(map_flags, F_MMAPABLE);
	map_uint(max_entries, 1);
	map_type(key, u32);
	map_type(value, struct control);
} control SEC(".maps");

struct {
	map_uint(type, MAP_TYPE_ARRAY);
	map_uint(map_flags, F_MMAPABLE);
	map_uint(max_entries, 1); // set by the loader
	map_type(key, u32);
	map_type(value, u64);
} bitmap SEC(".maps");

struct {
	map_uint(type, MAP_TYPE_RINGBUF);
	map_uint(max_entries, 1 << 20); // set by the loader
} ring SEC(".maps");

// A write between submission and completion.
struct flight {
	u64 bio;      // its address; 0: the place is free, BUSY: it is being filled
	u64 from, to; // sectors of the whole disk
	u64 left;     // bytes that have not completed
	u64 time;     // of submission, ns since boot
	u32 state;    // of control then; odd: not captured
	u32 dev;
	u64 pad[2]; // to a line of the processor's cache
};

#define BUSY 1

// A table of the writes in flight. It is probed at PROBES places from the bio's hash
// on; a write for which all are taken is not noted. A table of the kernel's own
// would cost several times as much, and each write comes here twice.
struct {
	map_uint(type, MAP_TYPE_ARRAY);
	map_uint(map_flags, F_MMAPABLE);
	map_uint(max_entries, MAX_FLYING);
	map_type(key, u32);
	map_type(value, struct flight);
} flying SEC(".maps");

struct counters {
	u64 writes, bytes, flushes; // captured
	u64 marked;
	u64 seen, seen_bytes; // submissions of data or zeroes
	u64 foreign_bytes;    // completions of what was submitted before the capture
};

struct {
	map_uint(type, MAP_TYPE_PERCPU_ARRAY);
	map_uint(max_entries, MAX_DISKS);
	map_type(key, u32);
	map_type(value, struct counters);
} counts SEC(".maps");

enum { KIND_DATA = 1, KIND_ZERO, KIND_DISCARD, KIND_FLUSH, KIND_SOFT };

// What a ring record begins with; ring.go reads it.
struct header {
	u64 offset; // bytes from the start of the watched range
	u64 time;   // ns since boot
	u32 length; // bytes; of data they follow
	u16 watch;
	u16 kind;
};

#define RECORD(size)         \
	struct record_##size {   \
		struct header head;  \
		u8 data[size];       \
	}
RECORD(4096);
RECORD(16384);
RECORD(65536);

#endif
