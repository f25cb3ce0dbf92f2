// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// What the programs need of the kernel and of BPF, and no more. Structures name
// only the members that are used; the loader moves every access to where the
// running kernel has the member (CO-RE). Helper numbers are kernel ABI.
#ifndef FARSIDE_KERNEL_H
#define FARSIDE_KERNEL_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define core __attribute__((preserve_access_index))

// Map definitions, as BTF.
#define map_uint(name, val) int (*name)[val]
#define map_type(name, val) typeof(val) *name

enum {
	MAP_TYPE_ARRAY = 2,
	MAP_TYPE_PERCPU_ARRAY = 6,
	MAP_TYPE_RINGBUF = 27,
	F_MMAPABLE = 1 << 10,
	RB_NO_WAKEUP = 1,
};

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static u64 (*bpf_ktime_get_ns)(void) = (void *)5;
static long (*bpf_probe_read_kernel)(void *dst, u32 size, const void *src) = (void *)113;
static void *(*bpf_ringbuf_reserve)(void *ring, u64 size, u64 flags) = (void *)131;
static void (*bpf_ringbuf_submit)(void *data, u64 flags) = (void *)132;
static void (*bpf_ringbuf_discard)(void *data, u64 flags) = (void *)133;
static long (*bpf_loop)(u32 n, void *callback, void *ctx, u64 flags) = (void *)181;

// core_read copies a member through a pointer that the verifier knows nothing of.
#define core_read(dst, member) \
	bpf_probe_read_kernel(dst, sizeof(*(dst)), __builtin_preserve_access_index(&(member)))
#define core_exists(member) __builtin_preserve_field_info(member, 2)
#define core_enum(type, value) __builtin_preserve_enum_value(*(typeof(type) *)value, 1)

struct page;

struct block_device;

struct gendisk {
	struct block_device *part0;
} core;

struct block_device {
	struct gendisk *bd_disk;
	u32 bd_dev;
} core;

struct bio_vec { // not relocated: the loader compares the layout
	struct page *bv_page;
	u32 bv_len;
	u32 bv_offset;
};

struct bvec_iter {
	u64 bi_sector;
	u32 bi_size;
	u32 bi_idx;
	u32 bi_bvec_done;
} core;

struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev;
	u32 bi_opf;
	u8 bi_status;
	struct bvec_iter bi_iter;
	void *bi_private;
	struct bio_vec *bi_io_vec;
	void *bi_crypt_context; // only with inline encryption
} core;

struct request {
	u32 cmd_flags;
	struct bio *bio;
} core;

// Operations, since Linux 4.10; the loader compares those of the running kernel.
enum {
	OP_WRITE = 1,
	OP_FLUSH = 2,
	OP_DISCARD = 3,
	OP_SECURE_ERASE = 5,
	OP_WRITE_ZEROES = 9,
	OP_MASK = 0xff,
	// Of a completion: a status, before Linux 5.16 a negative error number.
	STATUS_NOTSUPP = 1,
	STATUS_AGAIN = 12,
	ERROR_AGAIN = -11,
	ERROR_NOTSUPP = -95,
};

enum req_flag_bits {
	__REQ_PREFLUSH = 18, // this one does move
};

#endif
