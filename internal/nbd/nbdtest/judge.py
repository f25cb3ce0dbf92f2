# Tries every command of the block protocol on an export, and every error.
# Arguments: uri, size, minimum block, "rw" or "ro", directory of certificates.
import errno
import os
import sys

import nbd

uri, size, block, mode, certs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
MiB = 1 << 20


def connect(meta=True, structured=True):
    h = nbd.NBD()
    if certs:
        h.set_tls_certificates(certs)
    h.set_request_structured_replies(structured)
    if meta:
        h.add_meta_context("base:allocation")
    h.connect_uri(uri)
    h.set_strict_mode(0)  # wrong requests shall reach the server
    return h


def refused(code, what, *args, **kw):
    try:
        what(*args, **kw)
    except nbd.Error as e:
        assert e.errnum == code, "%s%r: %s, want %s" % (what.__name__, args[1:], e, code)
    else:
        raise AssertionError("%s%r was done" % (what.__name__, args[1:]))
    h.pread(block, 0)  # the connection goes on


def extents(off, n, flags=0):
    got = []
    h.block_status(n, off, lambda ctx, o, entries, err: got.extend(entries) or 0, flags)
    return list(zip(got[::2], got[1::2]))


def chunks(off, n, flags=0):
    got = []

    def chunk(buf, o, status, err):
        got.append((o, len(buf), status))

    data = h.pread_structured(n, off, chunk, flags)
    return data, sorted(got)


h = connect()
assert h.get_size() == size, h.get_size()
assert h.get_structured_replies_negotiated()
assert h.can_flush() and h.can_fua() and h.can_df() and h.can_cache() and h.can_meta_context("base:allocation")
assert h.is_read_only() == (mode == "ro")
assert h.get_block_size(nbd.SIZE_MINIMUM) == block
assert h.get_block_size(nbd.SIZE_MAXIMUM) >= 32 * MiB

# Errors.
refused(errno.EINVAL, h.pread, block, size)
refused(errno.EINVAL, h.pread, 2 * block, size - block)
refused(errno.EINVAL, h.pread, block, (1 << 63) - block)
refused(errno.EINVAL, h.cache, block, size)
refused(errno.EINVAL, h.block_status, block, size, lambda *a: 0)
refused(errno.EINVAL, h.block_status, 0, 0, lambda *a: 0)
if size > 40 * MiB:
    refused(errno.EINVAL, h.pread, 33 * MiB, 0)
    refused(errno.EOVERFLOW, h.pread_structured, 33 * MiB, 0, lambda *a: 0, nbd.CMD_FLAG_DF)
if block > 1:
    refused(errno.EINVAL, h.pread, 1, 0)
    refused(errno.EINVAL, h.pread, block, 1)

if mode == "ro":
    refused(errno.EPERM, h.pwrite, bytearray(block), 0)
    refused(errno.EPERM, h.trim, block, 0)
    refused(errno.EPERM, h.zero, block, 0)
    h.flush()
else:
    refused(errno.ENOSPC, h.pwrite, bytearray(block), size)
    refused(errno.ENOSPC, h.zero, 2 * block, size - block)
    if h.can_trim():
        refused(errno.EINVAL, h.trim, block, size)
    else:
        refused(errno.ENOTSUP, h.trim, block, 0)
    if size > 40 * MiB:
        refused(errno.EINVAL, h.pwrite, bytearray(33 * MiB), 0)
    if block > 1:
        refused(errno.EINVAL, h.pwrite, bytearray(1), 0)

    # Writes of all kinds, read back in all ways.
    for flags in 0, nbd.CMD_FLAG_FUA:
        for n in block, 4096, 65536 + block, 3 * MiB:
            want = bytearray(os.urandom(n))
            h.pwrite(want, 7 * block, flags)
            assert h.pread(n, 7 * block) == want
            for df in 0, nbd.CMD_FLAG_DF:
                data, parts = chunks(7 * block, n, df)
                assert data == want
                assert sum(p[1] for p in parts) == n
                assert not df or len(parts) == 1
    h.flush()

    # Zeroes and trim.
    clusters = 4 * MiB
    h.pwrite(bytearray(os.urandom(clusters)), 0)
    kinds = [(h.zero, 0), (h.zero, nbd.CMD_FLAG_NO_HOLE), (h.zero, nbd.CMD_FLAG_FUA)]
    if h.can_fast_zero():
        kinds.append((h.zero, nbd.CMD_FLAG_FAST_ZERO))
    for what, flags in kinds:
        h.pwrite(bytearray(b"\x55" * MiB), MiB)
        try:
            what(MiB - 2 * block, MiB + block, flags)
        except nbd.Error as e:
            assert flags == nbd.CMD_FLAG_FAST_ZERO and e.errnum in (errno.ENOTSUP, errno.EOPNOTSUPP), e
            continue
        got = h.pread(MiB, MiB)
        assert got == b"\x55" * block + bytes(MiB - 2 * block) + b"\x55" * block, flags
    if h.can_trim():
        h.trim(MiB, 2 * MiB, nbd.CMD_FLAG_FUA)
        h.pread(MiB, 2 * MiB)  # may be anything
    h.zero(clusters, 0)
    data, parts = chunks(0, clusters)
    assert data == bytes(clusters)
    assert all(p[2] == nbd.READ_HOLE for p in parts), parts

    # The map covers what was asked for.
    h.pwrite(bytearray(b"\x01" * 65536), 2 * MiB)
    for off, n in (0, clusters), (block, 2 * MiB), (2 * MiB, 65536):
        e = extents(off, n)
        assert sum(x[0] for x in e) >= n and all(x[0] for x in e), e
    at, states = 0, {}
    for n, state in extents(0, clusters):
        states.update((b, state) for b in range(at // 65536, (at + n) // 65536))
        at += n
    assert states[2 * MiB // 65536] & nbd.STATE_ZERO == 0, states
    assert len(extents(0, clusters, nbd.CMD_FLAG_REQ_ONE)) == 1

    # Many requests at once.
    done, bufs = [], []
    for i in range(64):
        b = nbd.Buffer.from_bytearray(bytearray([i]) * 65536)
        bufs.append(b)
        h.aio_pwrite(b, i * 65536, lambda err: done.append(err.value) or 1)
    while len(done) < 64:
        h.poll(-1)
    assert not any(done), done
    bufs = [nbd.Buffer(65536) for _ in range(64)]
    for i in range(64):
        h.aio_pread(bufs[i], i * 65536, lambda err: done.append(err.value) or 1)
    while len(done) < 128:
        h.poll(-1)
    assert not any(done), done
    assert all(bufs[i].to_bytearray() == bytes([i]) * 65536 for i in range(64))

    # What one connection wrote another one sees; a flush there covers it.
    if h.can_multi_conn():
        other = connect()
        h.pwrite(bytearray(b"\x77" * block), 0)
        other.flush()
        assert other.pread(block, 0) == b"\x77" * block
        other.shutdown()

h.cache(MiB, 0)

# The plain way, without structured replies.
plain = connect(meta=False, structured=False)
assert not plain.get_structured_replies_negotiated()
assert plain.pread(MiB, 0) == h.pread(MiB, 0)
plain.shutdown()

# Negotiation step by step.
o = nbd.NBD()
if certs:
    o.set_tls_certificates(certs)
o.set_opt_mode(True)
o.connect_uri(uri)
name = o.get_export_name()
o.add_meta_context("base:allocation")
found = []
o.opt_list_meta_context(lambda n: found.append(n) or 0)
assert found == ["base:allocation"], found
o.opt_info()
assert o.get_size() == size
o.set_export_name("no such export")
try:
    o.opt_go()
except nbd.Error as e:
    assert e.errnum == errno.ENOENT, e
else:
    raise AssertionError("an export that does not exist")
o.set_export_name(name)
o.opt_go()
assert o.pread(block, 0) == h.pread(block, 0)
o.shutdown()
h.shutdown()
print("judged")
