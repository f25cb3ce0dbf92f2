// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Capture of block writes. The programs run where a bio is submitted and where
// it completes; docs/capture.md tells the whole story.
//
//   submission   data mode:   copy the write into the ring; on failure go to bitmap mode
//                bitmap mode: mark the write in the bitmap
//                both:        note the bio in "flying"
//   completion   writes that were not captured in the present span of data mode are
//                marked again: a reader may have cleared the mark and read too early
//
// control.state tells the mode: even is data, odd is bitmap. Programs only go from
// even to odd (compare and swap), user space only from odd to even.
#include "state.h"

// ---- marking

struct mark_words {
	u64 lo, hi; // bits
	u64 first;  // word
};

static long mark_word(u32 i, struct mark_words *m)
{
	u64 w = m->lo / 64 + i, mask = ~0ULL;
	if (w == m->lo / 64)
		mask &= ~0ULL << (m->lo % 64);
	if (w == m->hi / 64)
		mask &= ~0ULL >> (63 - m->hi % 64);
	u32 key = m->first + w;
	u64 *word = bpf_map_lookup_elem(&bitmap, &key);
	if (word)
		__sync_fetch_and_or(word, mask);
	return 0;
}

// mark puts a range of sectors of a whole disk into the bitmap, as far as it is
// watched. If early is true the write is yet to be issued: a bit that is set need
// not be set again, since its completion will.
__attribute__((noinline)) int mark(u32 dev, u64 from, u64 to, u32 early)
{
	for (u32 i = 0; i < MAX_DISKS && i < watch_count; i++) {
		u64 lo = from, hi = to;
		if (watches[i].dev != dev)
			continue;
		if (lo < watches[i].start)
			lo = watches[i].start;
		if (hi > watches[i].end)
			hi = watches[i].end;
		if (lo >= hi)
			continue;
		struct mark_words m = {
			.lo = (lo - watches[i].start) >> block_shift,
			.hi = (hi - 1 - watches[i].start) >> block_shift,
			.first = watches[i].word,
		};
		if (m.lo / 64 != m.hi / 64) {
			bpf_loop(m.hi / 64 - m.lo / 64 + 1, mark_word, &m, 0);
			continue;
		}
		u32 key = m.first + m.lo / 64;
		u64 mask = (~0ULL << (m.lo % 64)) & (~0ULL >> (63 - m.hi % 64));
		u64 *word = bpf_map_lookup_elem(&bitmap, &key);
		if (word && !(early && (READ_ONCE(*word) & mask) == mask))
			__sync_fetch_and_or(word, mask);
	}
	return 0;
}

// overflow leaves data mode, if state (even) is still the state.
static void overflow(struct control *c, u32 state)
{
	if (!(state & 1))
		__sync_val_compare_and_swap(&c->state, state, state + 1);
}

// stale says whether the completion of f must be marked and waited for.
static int stale(struct control *c, struct flight *f)
{
	u32 now = READ_ONCE(c->state);
	return (now & 1) || f->state != now;
}

// ---- submission: copying

struct walk {
	u64 bio;    // its address as a number: the verifier forbids to reckon with pointers
	u64 vec;    // address of the bio's vector
	u64 offset; // bytes from the start of the range
	u64 time;
	u32 index, done; // piece of the vector, bytes of it that are copied
	u32 left;        // bytes of the bio
	u16 watch;
	u16 error; // 1: no room, 2: unreadable
};

// The walk of the program that runs on this processor: a program of a tracepoint is
// not interrupted by itself. It lies in a map rather than on the stack so that the
// verifier takes its members as unknown and finds all turns of a loop alike.
struct {
	map_uint(type, MAP_TYPE_PERCPU_ARRAY);
	map_uint(max_entries, 1);
	map_type(key, u32);
	map_type(value, struct walk);
} walks SEC(".maps");

static struct walk *get_walk(void)
{
	u32 zero = 0;
	return bpf_map_lookup_elem(&walks, &zero);
}

#define CHUNK 4096

// fill copies as much of the bio as goes into the size bytes of a record, and counts
// in its header. It returns the number of bytes copied, 0 after an error.
static __attribute__((always_inline)) u32 fill(struct walk *w, struct header *head, u8 *data, const u32 size)
{
	struct bio_vec v;
	head->length = 0;
#pragma clang loop unroll(disable)
	for (int i = 0; i < size / CHUNK + 8; i++) {
		u32 off = READ_ONCE(head->length);
		if (w->left == 0 || off > size - CHUNK)
			break;
		if (bpf_probe_read_kernel(&v, sizeof(v), (void *)(w->vec + w->index * sizeof(v))))
			return 0;
		u32 n = v.bv_len - w->done;
		u64 page = ((u64)v.bv_page - vmemmap_base) / page_struct;
		u64 addr = direct_base + (page << 12) + v.bv_offset + w->done;
		if (n > w->left)
			n = w->left;
		if (off == 0 && n >= size) {
			n = size;
			if (bpf_probe_read_kernel(data, size, (void *)addr))
				return 0;
		} else {
			if (n > CHUNK)
				n = CHUNK;
			barrier_var(n); // or the compiler drops the bound that the verifier needs
			n &= 2 * CHUNK - 1;
			if (n > CHUNK || n == 0)
				return 0;
			if (bpf_probe_read_kernel(data + off, n, (void *)addr))
				return 0;
		}
		head->length = off + n;
		w->left -= n;
		w->done += n;
		if (w->done >= v.bv_len) {
			w->index++;
			w->done = 0;
		}
		asm volatile("" ::: "memory");
	}
	return READ_ONCE(head->length);
}

#define COPY(size)                                                       \
	do {                                                                 \
		struct record_##size *r = bpf_ringbuf_reserve(&ring, sizeof(*r), 0); \
		if (!r) {                                                        \
			w->error = 1;                                                \
			return 1;                                                    \
		}                                                                \
		u32 n = fill(w, &r->head, r->data, size);                        \
		if (!n) {                                                        \
			bpf_ringbuf_discard(r, RB_NO_WAKEUP);                        \
			w->error = 2;                                                \
			return 1;                                                    \
		}                                                                \
		r->head.offset = w->offset;                                      \
		r->head.time = w->time;                                          \
		r->head.watch = w->watch;                                        \
		r->head.kind = KIND_DATA;                                        \
		bpf_ringbuf_submit(r, RB_NO_WAKEUP);                             \
		w->offset += n;                                                  \
	} while (0)

// copy_some moves one record's worth of the bio into the ring.
static long copy_some(u32 i, void *unused)
{
	struct walk *w = get_walk();
	if (!w || w->left == 0)
		return 1;
	if (w->left > 49152)
		COPY(65536);
	else if (w->left > 8192)
		COPY(16384);
	else
		COPY(4096);
	return 0;
}

// copy_data captures the data of a bio; it returns 0, or the walk's error.
static int copy_data(struct bio *bio, u32 watch, u64 offset, u64 now)
{
	struct walk *w = get_walk();
	void *crypt = 0;
	if (core_exists(bio->bi_crypt_context))
		crypt = bio->bi_crypt_context;
	if (!w || crypt || core_read(&w->vec, bio->bi_io_vec)) // with crypt, the disk gets other bytes
		return 2;
	w->offset = offset;
	w->time = now;
	w->index = bio->bi_iter.bi_idx;
	w->done = bio->bi_iter.bi_bvec_done;
	w->left = bio->bi_iter.bi_size;
	w->watch = watch;
	w->error = 0;
	bpf_loop(MAX_PIECES, copy_some, 0, 0);
	return w->left && !w->error ? 2 : w->error;
}

// copy_head captures what has no data.
static int copy_head(u32 kind, u32 watch, u64 offset, u32 length, u64 now)
{
	struct header *h = bpf_ringbuf_reserve(&ring, sizeof(*h), 0);
	if (!h)
		return 1;
	h->offset = offset;
	h->time = now;
	h->length = length;
	h->watch = watch;
	h->kind = kind;
	bpf_ringbuf_submit(h, RB_NO_WAKEUP);
	return 0;
}

// ---- submission

static struct control *get_control(void)
{
	u32 zero = 0;
	return bpf_map_lookup_elem(&control, &zero);
}

static u32 probe(u64 bio, u32 i)
{
	return ((u32)((bio * 0x9e3779b97f4a7c15ULL) >> (64 - FLYING_BITS)) + i) & (MAX_FLYING - 1);
}

// find_flight returns what is noted of a bio.
static struct flight *find_flight(u64 bio)
{
	if (bio <= BUSY)
		return 0;
	for (u32 i = 0; i < PROBES; i++) {
		u32 key = probe(bio, i);
		struct flight *f = bpf_map_lookup_elem(&flying, &key);
		if (f && READ_ONCE(f->bio) == bio)
			return f;
	}
	return 0;
}

// fill_in writes a note into a place that is this program's. User space reads it only when
// it is whole.
static void fill_in(struct flight *at, struct flight *f)
{
	at->from = f->from;
	at->to = f->to;
	at->left = f->left;
	at->time = f->time;
	at->state = f->state;
	at->dev = f->dev;
	asm volatile("" ::: "memory");
	WRITE_ONCE(at->bio, f->bio);
}

// take_off notes a write that is on its way. If the bio is known already, its
// last write has completed unseen. (A note behind the first free place is not found; user
// space gives it up when it is old.)
static void take_off(struct control *c, struct flight *f)
{
	for (u32 i = 0; i < PROBES; i++) {
		u32 key = probe(f->bio, i);
		struct flight *at = bpf_map_lookup_elem(&flying, &key);
		if (!at)
			return;
		u64 bio = READ_ONCE(at->bio);
		if (bio == f->bio) {
			if (stale(c, at)) {
				mark(at->dev, at->from, at->to, 0);
				__sync_fetch_and_add(&c->lost, 1);
			}
			WRITE_ONCE(at->bio, BUSY);
			asm volatile("" ::: "memory");
			fill_in(at, f);
			return;
		}
		if (bio == 0 && __sync_val_compare_and_swap(&at->bio, 0, BUSY) == 0) {
			fill_in(at, f);
			return;
		}
	}
	c->untracked_at = f->time;
}

// flush_all records a flush of every watched range of a disk.
static void flush_all(struct control *c, u32 dev, u32 state, u64 now)
{
	for (u32 i = 0; i < MAX_DISKS && i < watch_count; i++) {
		if (watches[i].dev != dev || (state & 1))
			continue;
		u32 key = i;
		struct counters *n = bpf_map_lookup_elem(&counts, &key);
		if (n)
			n->flushes++;
		if (copy_head(KIND_FLUSH, i, 0, 0, now)) {
			overflow(c, state);
			return;
		}
	}
}

// capture puts a write that lies in one watched range into the ring; it returns 0
// if all of it is there.
static int capture(struct control *c, struct bio *bio, u32 op, u32 i, u64 now)
{
	if (i >= MAX_DISKS)
		return 1;
	u32 size = bio->bi_iter.bi_size;
	u64 offset = (bio->bi_iter.bi_sector - watches[i].start) << 9;
	int err;
	if (op == OP_WRITE)
		err = size > max_bio ? 1 : copy_data(bio, i, offset, now);
	else if (op == OP_WRITE_ZEROES)
		err = copy_head(KIND_ZERO, i, offset, size, now);
	else if (op == OP_DISCARD || op == OP_SECURE_ERASE)
		err = copy_head(KIND_DISCARD, i, offset, size, now);
	else
		err = 1;
	if (err == 2)
		__sync_fetch_and_add(&c->unreadable, 1);
	return err;
}

static void count(u32 i, u32 op, u32 size, int captured)
{
	struct counters *n = bpf_map_lookup_elem(&counts, &i);
	if (!n)
		return;
	if (op != OP_DISCARD) { // what the kernel counts as written
		n->seen++;
		n->seen_bytes += size;
	}
	if (!captured) {
		n->marked++;
		return;
	}
	n->writes++;
	if (op == OP_WRITE)
		n->bytes += size;
}

// find returns the first watched range that has sectors of [from, to), or -1.
static int find(u32 dev, u64 from, u64 to)
{
	for (u32 i = 0; i < MAX_DISKS && i < watch_count; i++)
		if (watches[i].dev == dev && from < watches[i].end && to > watches[i].start)
			return i;
	return -1;
}

static int submit(struct bio *bio, u32 op, u32 dev, u32 i)
{
	struct control *c = get_control();
	struct walk *w = get_walk();
	if (!c || !w || i >= MAX_DISKS)
		return 0;
	w->bio = (u64)bio;
	u64 from = bio->bi_iter.bi_sector;
	u32 size = bio->bi_iter.bi_size;
	struct flight f = {
		.bio = READ_ONCE(w->bio),
		.from = from,
		.to = from + (size >> 9),
		.left = size,
		.time = bpf_ktime_get_ns(),
		.state = READ_ONCE(c->state),
		.dev = dev,
	};
	if (!(f.state & 1)) {
		int inside = f.from >= watches[i].start && f.to <= watches[i].end;
		if (!inside || capture(c, bio, op, i, f.time)) {
			overflow(c, f.state);
			f.state |= 1;
		}
	}
	if (f.state & 1)
		mark(dev, f.from, f.to, 1);
	count(i, op, size, !(f.state & 1));
	take_off(c, &f);
	return 0;
}

SEC("tp_btf/block_bio_queue")
int on_queue(u64 *ctx)
{
	struct bio *bio = (struct bio *)ctx[0];
	u32 flags = bio->bi_opf, op = flags & OP_MASK;
	if (!(op & 1) && op != OP_FLUSH) // even operations change nothing
		return 0;
	u32 dev = bio->bi_bdev->bd_disk->part0->bd_dev;
	u64 from = bio->bi_iter.bi_sector;
	if (op == OP_FLUSH || (flags & (1u << core_enum(enum req_flag_bits, __REQ_PREFLUSH)))) {
		struct control *c = get_control();
		if (c)
			flush_all(c, dev, READ_ONCE(c->state), bpf_ktime_get_ns());
	}
	u32 size = bio->bi_iter.bi_size;
	if (size == 0)
		return 0;
	int i = find(dev, from, from + (size >> 9));
	if (i < 0)
		return 0;
	return submit(bio, op, dev, i);
}

// ---- completion

// grave says whether a failed write needs an overflow: the copy may hold what the disk
// refused. Not if nothing was done and the submitter tries again, by another
// operation or with more patience: user space sees that in the ring, or overflows.
static int grave(int error)
{
	return error && error != STATUS_NOTSUPP && error != STATUS_AGAIN && error != ERROR_NOTSUPP && error != ERROR_AGAIN;
}

// note_soft puts the failure of a captured write into the ring; it returns 0 if it is
// there.
static int note_soft(u32 dev, u64 from, u64 n)
{
	u32 i = find(dev, from, from + (n >> 9));
	if (i >= MAX_DISKS || from < watches[i].start)
		return 1;
	return copy_head(KIND_SOFT, i, (from - watches[i].start) << 9, n, bpf_ktime_get_ns());
}

// touch_down handles n completed bytes of a write that is known under key.
static int touch_down(struct control *c, u64 key, u64 from, u64 n, int error)
{
	struct flight *f = find_flight(key);
	if (!f || from < f->from || from + (n >> 9) > f->to)
		return 0;
	u32 state = READ_ONCE(c->state);
	int old = stale(c, f);
	if (error)
		__sync_fetch_and_add(&c->failed, 1);
	if (old && state == READ_ONCE(c->settled)) {
		__sync_fetch_and_add(&c->late, 1);
		overflow(c, state);
	} else if (grave(error)) {
		overflow(c, state);
	} else if (error && !old) {
		if (note_soft(f->dev, from, n))
			overflow(c, state);
		else
			error = 0;
	}
	if (old || error) // after the overflow: who takes the mark can see that a Lost is due
		mark(f->dev, from, from + (n >> 9), 0);
	if (__sync_fetch_and_add(&f->left, -n) <= n)
		WRITE_ONCE(f->bio, 0);
	return 1;
}

// stranger handles the completion of a write that is not known: it was submitted before
// the capture began, or there was no room to note it.
static void stranger(struct control *c, u32 op, u32 dev, u64 from, u64 n)
{
	if (READ_ONCE(c->state) == READ_ONCE(c->settled))
		return;
	u32 i = find(dev, from, from + (n >> 9));
	if (i >= MAX_DISKS) // also if there is none
		return;
	mark(dev, from, from + (n >> 9), 0);
	struct counters *k = bpf_map_lookup_elem(&counts, &i);
	if (k && op != OP_DISCARD && READ_ONCE(c->settled) == NEVER && bpf_ktime_get_ns() < READ_ONCE(c->strangers))
		k->foreign_bytes += n;
}

// The completion that is handled on this processor; in a map for the reasons of walk.
struct landing {
	u64 bio;  // as a number, like walk.bio
	u64 left; // bytes
	int error;
	u32 op;
};

struct {
	map_uint(type, MAP_TYPE_PERCPU_ARRAY);
	map_uint(max_entries, 1);
	map_type(key, u32);
	map_type(value, struct landing);
} landings SEC(".maps");

static struct landing *get_landing(void)
{
	u32 zero = 0;
	return bpf_map_lookup_elem(&landings, &zero);
}

// land_bio handles one bio of a completed request: itself, or a piece that was split
// off and points to the bio that was submitted.
static long land_bio(u32 i, void *unused)
{
	struct landing *l = get_landing();
	struct control *c = get_control();
	u64 from = 0, parent = 0, next = 0;
	u32 size = 0;
	if (!l || !c || !l->bio || !l->left)
		return 1;
	struct bio *bio = (struct bio *)l->bio;
	if (core_read(&from, bio->bi_iter.bi_sector) || core_read(&size, bio->bi_iter.bi_size) || core_read(&next, bio->bi_next))
		return 1;
	u64 n = size < l->left ? size : l->left;
	if (n && !touch_down(c, (u64)bio, from, n, l->error)) {
		core_read(&parent, bio->bi_private);
		if (!touch_down(c, parent, from, n, l->error)) {
			struct block_device *bdev = 0;
			struct gendisk *disk = 0;
			u32 dev = 0;
			core_read(&bdev, bio->bi_bdev);
			core_read(&disk, bdev->bd_disk);
			core_read(&bdev, disk->part0);
			core_read(&dev, bdev->bd_dev);
			stranger(c, l->op, dev, from, n);
		}
	}
	l->left -= n;
	l->bio = next;
	return 0;
}

SEC("tp_btf/block_rq_complete")
int on_request_complete(u64 *ctx)
{
	struct request *rq = (struct request *)ctx[0];
	if (!(rq->cmd_flags & 1))
		return 0;
	struct bio *bio = rq->bio;
	u64 n = (u32)ctx[2];
	struct landing *l = get_landing();
	struct control *c = get_control();
	if (!l || !c || !bio || n == 0)
		return 0;
	u32 dev = bio->bi_bdev->bd_disk->part0->bd_dev;
	if (find(dev, 0, ~0ULL) < 0) // another disk
		return 0;
	l->bio = (u64)bio;
	if (bio->bi_iter.bi_size < n) { // several, or pieces of several
		l->left = n;
		l->error = (int)ctx[1];
		l->op = rq->cmd_flags & OP_MASK;
		bpf_loop(MAX_MERGED, land_bio, 0, 0);
		return 0;
	}
	u64 from = bio->bi_iter.bi_sector, key = READ_ONCE(l->bio);
	if (touch_down(c, key, from, n, (int)ctx[1]))
		return 0;
	l->bio = (u64)bio->bi_private;
	key = READ_ONCE(l->bio);
	if (!touch_down(c, key, from, n, (int)ctx[1]))
		stranger(c, rq->cmd_flags & OP_MASK, dev, from, n);
	return 0;
}

// Devices without requests, and bios that failed before they became one. The bio is
// advanced already: what it was is only in flying.
SEC("tp_btf/block_bio_complete")
int on_bio_complete(u64 *ctx)
{
	struct bio *bio = (struct bio *)ctx[1];
	u64 key = 0;
	bpf_probe_read_kernel(&key, sizeof(key), &ctx[1]); // as a number
	struct flight *f = find_flight(key);
	struct control *c = get_control();
	if (!f || !c || !(bio->bi_opf & 1))
		return 0;
	touch_down(c, key, f->from, (f->to - f->from) << 9, bio->bi_status);
	return 0;
}
