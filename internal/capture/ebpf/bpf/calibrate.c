// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Finds where the kernel keeps page structures and physical memory, so that
// capture.c can copy from the pages of a bio. See calibrate_linux.go.
#include "kernel.h"

char licence[] SEC("license") = "Dual BSD/GPL";

const volatile u32 want_dev;

// What user space looks for and what was seen.
struct sighting {
	u64 sector; // of the whole disk; set by user space
	u64 page;   // address of the page structure
	u32 offset; // in the page
	u32 count;
};

struct {
	map_uint(type, MAP_TYPE_ARRAY);
	map_uint(max_entries, 1);
	map_type(key, u32);
	map_type(value, struct sighting);
} sightings SEC(".maps");

// see notes the first page of a read of the wanted sector.
SEC("tp_btf/block_bio_queue")
int see(u64 *ctx)
{
	struct bio *bio = (struct bio *)ctx[0];
	u32 zero = 0;
	struct sighting *s = bpf_map_lookup_elem(&sightings, &zero);
	if (!s || (bio->bi_opf & OP_MASK) != 0 || bio->bi_iter.bi_sector != s->sector)
		return 0;
	if (bio->bi_bdev->bd_disk->part0->bd_dev != want_dev)
		return 0;
	u64 vec;
	struct bio_vec v;
	if (core_read(&vec, bio->bi_io_vec) ||
	    bpf_probe_read_kernel(&v, sizeof(v), (void *)(vec + bio->bi_iter.bi_idx * sizeof(v))))
		return 0;
	s->page = (u64)v.bv_page;
	s->offset = v.bv_offset + bio->bi_iter.bi_bvec_done;
	s->count++;
	return 0;
}

// A search for a token at start, start+step, ...
struct search {
	u64 start, step;
	u64 token[2];
	u64 found; // an address, or 0
	u32 count;
	u32 pad;
};

static long look(u32 i, struct search *s)
{
	u64 got[2] = {}, addr = s->start + i * s->step;
	if (bpf_probe_read_kernel(got, sizeof(got), (void *)addr) == 0 && got[0] == s->token[0] && got[1] == s->token[1]) {
		s->found = addr;
		return 1;
	}
	return 0;
}

SEC("syscall")
int find_token(struct search *ctx)
{
	struct search s = *ctx;
	s.found = 0;
	bpf_loop(s.count, look, &s, 0);
	ctx->found = s.found;
	return 0;
}
