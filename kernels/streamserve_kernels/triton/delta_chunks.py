"""Gated delta rules of many tokens at once: chunks of them as matrix products.

Within a chunk of tokens 1 to n, S the state before it, g_i the sum of log decays up to token i, the
updates depend on each other only through products of keys (Yang et al. 2024, the WY form):

    u_i = b_i (v_i - exp(g_i) S^T k_i - sum over j < i of exp(g_i - g_j) (k_i . k_j) u_j)
    y_i = exp(g_i) S^T q_i + sum over j <= i of exp(g_i - g_j) (q_i . k_j) u_j
    the state after token i: exp(g_i) S + sum over j <= i of exp(g_i - g_j) k_j u_j^T

So U = (I + A)^-1 diag(b) (V - diag(exp(g)) K S), with A of numbers that no state is part of. One
launch finds these for all chunks at once, a second one goes through the chunks of a sequence, with
columns of the state in registers. Keys and queries enter products as they are, and their lengths
beside them: so only states and updates are rounded for the matrix units.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from streamserve_kernels.triton.elementwise import sigmoid
from streamserve_kernels.triton.recurrent_kernels import softplus
from streamserve_kernels.triton.runtime import jit

CHUNK = 64
_CHUNK = tl.constexpr(CHUNK)
_LEVELS = tl.constexpr(CHUNK.bit_length() - 1)
# Of float32: three products of numbers of 11 bits. Numbers of 16 bits are multiplied as they are.
EXACT = "tf32x3"
_EXACT = tl.constexpr(EXACT)
_REQUESTS = tl.constexpr(256)  # read at a time


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):
    """To the 11 bits that the matrix units take of a number: the others they cut off."""
    if PRECISION == "tf32":
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _chunk_of(number, query_start_loc, R, FEW: tl.constexpr):
    """(sequence, chunk of it) of the `number`-th chunk of those of more than FEW tokens."""
    sequence = tl.full([], 0, tl.int32)
    before = tl.full([], 0, tl.int32)
    passed = tl.full([], 0, tl.int32)
    for base in range(0, R, _REQUESTS):
        r = base + tl.arange(0, _REQUESTS)
        begin = tl.load(query_start_loc + r, mask=r < R, other=0)
        count = tl.load(query_start_loc + r + 1, mask=r < R, other=0) - begin
        chunks = tl.where(count > FEW, (count + _CHUNK - 1) // _CHUNK, 0)
        ended = (passed + tl.cumsum(chunks, 0) <= number) & (r < R)
        sequence += tl.sum(ended.to(tl.int32), 0)
        before += tl.sum(tl.where(ended, chunks, 0), 0)
        passed += tl.sum(chunks, 0)
    return sequence, number - before


@triton.jit
def _inverse(lower):
    """(I + lower)^-1 of a matrix [CHUNK, CHUNK] with nothing on its diagonal, nor above.

    Of two blocks and what is below the first: (X, 0; -Y L X, Y), with X and Y their inverses. All
    blocks of a size are put together at once, from single numbers on.
    """
    i = tl.arange(0, _CHUNK)[:, None]
    j = tl.arange(0, _CHUNK)[None, :]
    inverse = tl.where(i == j, 1.0, 0.0)
    inverse -= tl.where((i == j + 1) & (i // 2 == j // 2), lower, 0.0)
    for level in range(1, _LEVELS):
        is_below = ((i >> level) == (j >> level) + 1) & ((i >> level + 1) == (j >> level + 1))
        below = tl.dot(tl.where(is_below, lower, 0.0), inverse, input_precision=_EXACT)
        inverse -= tl.dot(inverse, below, input_precision=_EXACT)
    return inverse


@jit(do_not_specialize=["T", "R"])
def delta_parts_kernel(
    qkv,  # [T, 2 * HK * D + HV * DV], rows `qkv_stride` apart
    gates,  # [T, 2 * HV], rows `gates_stride` apart
    decay,  # [HV]
    time_bias,  # [HV]
    query_start_loc,  # [R + 1]
    updates,  # [T, HV, CHUNK] float32: (I + A)^-1 diag(b)
    scores,  # [T, HV, CHUNK] float32: of queries and keys, decayed
    scales,  # [3, T, HV] float32: log decays from the chunk's beginning; of keys; of queries
    qkv_stride,
    gates_stride,
    T,
    R,
    HK: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FEW: tl.constexpr,
    PRECISION: tl.constexpr,  # of products with states and updates
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
):
    """What a chunk's updates and outputs are made of, for a head, whatever the state before it."""
    if OVERLAP:
        gdc_launch_dependents()
    head = tl.program_id(0)
    r, chunk = _chunk_of(tl.program_id(1), query_start_loc, R, FEW)
    begin = tl.load(query_start_loc + r) + chunk * _CHUNK
    end = tl.load(query_start_loc + r + 1, mask=r < R, other=0)
    rate = tl.load(decay + head)
    bias = tl.load(time_bias + head)
    if OVERLAP:
        gdc_wait()
    if r >= R:
        return
    rows = (begin + tl.arange(0, _CHUNK)).to(tl.int64)
    inside = rows < end
    d = tl.arange(0, BLOCK_D)
    of_query = qkv + rows[:, None] * qkv_stride + head // (HV // HK) * D + d[None, :]
    is_key = inside[:, None] & (d < D)[None, :]
    query = tl.load(of_query, mask=is_key, other=0.0)
    key = tl.load(of_query + HK * D, mask=is_key, other=0.0)
    of_head = gates + rows * gates_stride + head
    beta = sigmoid(tl.load(of_head, mask=inside, other=0.0).to(tl.float32))
    beta = beta.to(gates.dtype.element_ty).to(tl.float32)
    step = softplus(tl.load(of_head + HV, mask=inside, other=0.0).to(tl.float32) + bias)
    log_decay = tl.cumsum(tl.where(inside, rate * step, 0.0), 0)
    key32 = key.to(tl.float32)
    query32 = query.to(tl.float32)
    of_keys = tl.rsqrt(tl.sum(key32 * key32, axis=1) + 1e-6)
    of_queries = D**-0.5 * tl.rsqrt(tl.sum(query32 * query32, axis=1) + 1e-6)
    i = tl.arange(0, _CHUNK)[:, None]
    j = tl.arange(0, _CHUNK)[None, :]
    passed = log_decay[:, None] - log_decay[None, :]
    decayed = tl.where(i >= j, tl.exp(tl.where(i >= j, passed, 0.0)), 0.0) * of_keys[None, :]
    place = rows * HV + head
    out = place[:, None] * _CHUNK + j
    seen = tl.dot(query, tl.trans(key), input_precision=_EXACT) * of_queries[:, None] * decayed
    tl.store(scores + out, _rounded(seen, PRECISION), mask=inside[:, None])
    lower = tl.dot(key, tl.trans(key), input_precision=_EXACT)
    lower *= (beta * of_keys)[:, None] * decayed
    solved = _inverse(tl.where(i > j, lower, 0.0))
    solved = _rounded(solved * beta[None, :], PRECISION)
    tl.store(updates + out, solved, mask=inside[:, None])
    total = T.to(tl.int64) * HV
    tl.store(scales + place, log_decay, mask=inside)
    tl.store(scales + total + place, of_keys, mask=inside)
    tl.store(scales + 2 * total + place, of_queries, mask=inside)


@triton.jit
def _after(state, at, of_key, is_key, update, log_decay, of_keys, PRECISION: tl.constexpr):
    """The state after token `at` of a chunk."""
    i = tl.arange(0, _CHUNK)
    passed = tl.sum(tl.where(i == at, log_decay, 0.0), 0)
    share = tl.where(i <= at, of_keys * tl.exp(tl.where(i <= at, passed - log_decay, 0.0)), 0.0)
    # Again, and not kept in registers all the time.
    key = tl.trans(tl.load(of_key, mask=is_key, other=0.0).to(tl.float32))
    share = _rounded(update * share[:, None], PRECISION)
    added = tl.dot(key, share, input_precision=PRECISION)
    return state * tl.exp(passed) + added


@jit(do_not_specialize=["T"])
def delta_chunks_kernel(
    qkv,  # [T, 2 * HK * D + HV * DV], rows `qkv_stride` apart
    states,  # [X, HV, D, DV]
    slots,  # [R]
    saves,  # [T]
    query_start_loc,  # [R + 1]
    seq_lens,  # [R]
    updates,  # these three: see `delta_parts_kernel`
    scores,
    scales,
    y,  # [T, HV * DV]
    qkv_stride,
    T,
    HK: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FEW: tl.constexpr,
    PRECISION: tl.constexpr,  # of products with states and updates
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
):
    """A sequence's chunks one by one, on columns of a head's state that stay in registers."""
    if OVERLAP:
        gdc_launch_dependents()
    tiles: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    r = tl.program_id(1)
    head = tl.program_id(0) // tiles
    begin = tl.load(query_start_loc + r)
    count = tl.load(query_start_loc + r + 1) - begin
    slot = tl.load(slots + r)
    has_before = (slot >= 0) & (tl.load(seq_lens + r) > count)
    if OVERLAP:
        gdc_wait()
    if count <= FEW:
        return
    d = tl.arange(0, BLOCK_D)
    v = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    i = tl.arange(0, _CHUNK)
    is_key = d < D
    is_value = v < DV
    part = head * (D * DV) + d[:, None] * DV + v[None, :]
    is_part = is_key[:, None] & is_value[None, :]
    of_slot = states + tl.maximum(slot, 0).to(tl.int64) * (HV * D * DV)
    state = tl.load(of_slot + part, mask=is_part & has_before, other=0.0)
    total = T.to(tl.int64) * HV
    for first in range(0, count, _CHUNK):
        inside = first + i < count
        rows = (begin + first + i).to(tl.int64)
        place = rows * HV + head
        log_decay = tl.load(scales + place, mask=inside, other=0.0)
        of_keys = tl.load(scales + total + place, mask=inside, other=0.0)
        of_queries = tl.load(scales + 2 * total + place, mask=inside, other=0.0)
        row = qkv + rows * qkv_stride
        of_key = row[:, None] + (HK * D + head // (HV // HK) * D) + d[None, :]
        wanted = inside[:, None] & is_key[None, :]
        key = tl.load(of_key, mask=wanted, other=0.0).to(tl.float32)
        kept = tl.exp(log_decay)
        before = _rounded(state, PRECISION)
        known = tl.dot(key, before, input_precision=PRECISION) * (kept * of_keys)[:, None]
        written = inside[:, None] & is_value[None, :]
        of_value = row[:, None] + 2 * HK * D + head * DV + v[None, :]
        value = tl.load(of_value, mask=written, other=0.0).to(tl.float32)
        matrix = place[:, None] * _CHUNK + i[None, :]
        solved = tl.load(updates + matrix, mask=inside[:, None], other=0.0)
        missing = _rounded(value - known, PRECISION)
        update = tl.dot(solved, missing, input_precision=PRECISION)
        query = tl.load(of_key - HK * D, mask=wanted, other=0.0).to(tl.float32)
        found = tl.dot(query, before, input_precision=PRECISION) * (kept * of_queries)[:, None]
        seen = tl.load(scores + matrix, mask=inside[:, None], other=0.0)
        found = tl.dot(seen, _rounded(update, PRECISION), found, input_precision=PRECISION)
        out = y + rows[:, None] * (HV * DV) + head * DV + v[None, :]
        tl.store(out, found.to(y.dtype.element_ty), mask=written)
        save = tl.load(saves + rows, mask=inside, other=-1)
        at = tl.full([], -1, tl.int32)
        for _ in range(tl.sum((save >= 0).to(tl.int32), 0)):
            at = tl.min(tl.where((save >= 0) & (i > at), i, _CHUNK), 0)
            of_save = states + tl.sum(tl.where(i == at, save, 0), 0).to(tl.int64) * (HV * D * DV)
            after = _after(state, at, of_key, wanted, update, log_decay, of_keys, PRECISION)
            tl.store(of_save + part, after, mask=is_part)
        last = tl.minimum(count - first, _CHUNK) - 1
        state = _after(state, last, of_key, wanted, update, log_decay, of_keys, PRECISION)
    if slot >= 0:
        tl.debug_barrier()  # the whole program's reads of the state before what replaces it
        tl.store(of_slot + part, state, mask=is_part)
