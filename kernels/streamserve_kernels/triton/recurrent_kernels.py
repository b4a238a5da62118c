"""What layers with a state of constant size run: see `streamserve_kernels.recurrent`.

A sequence's state is read and written in one launch, so one program does both, of a part of it that
is no other program's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from streamserve_kernels.triton.elementwise import act, sigmoid
from streamserve_kernels.triton.runtime import bring_to_l2, jit

_REQUESTS = tl.constexpr(256)  # read at a time
_ZEROED = tl.constexpr(16)  # rows of nobody, at a time


@triton.jit
def _sequence(r, R, slots, query_start_loc, seq_lens):
    """(its first row, its tokens, its slot, whether that holds what was before); of R: no slot."""
    is_anybodys = r < R
    begin = tl.load(query_start_loc + r)
    count = tl.load(query_start_loc + r + 1, mask=is_anybodys, other=0) - begin
    slot = tl.load(slots + r, mask=is_anybodys, other=-1)
    length = tl.load(seq_lens + r, mask=is_anybodys, other=0)
    return begin, count, slot, (slot >= 0) & (length > count) & (count > 0)


@triton.jit
def _write_zeros(columns, begin, T, stride, is_column):
    """To rows `begin` to T - 1, `stride` apart, of these columns [N]."""
    for first in range(begin, T, _ZEROED):
        i = first + tl.arange(0, _ZEROED)
        rows = columns[None, :] + i.to(tl.int64)[:, None] * stride
        mask = (i < T)[:, None] & is_column[None, :]
        tl.store(rows, tl.zeros(rows.shape, columns.dtype.element_ty), mask=mask)


@triton.jit
def _later_tile(number, query_start_loc, T, R, BLOCK_T: tl.constexpr):
    """(sequence, tile of it) of the `number`-th tile of BLOCK_T tokens that is no sequence's first.

    The rows that belong to no sequence are sequence R, all of whose tiles count. R + 1: there are
    no more; no step of T tokens has more than `cdiv(T, BLOCK_T)`.
    """
    sequence = tl.full([], 0, tl.int32)
    before = tl.full([], 0, tl.int32)
    passed = tl.full([], 0, tl.int32)
    for base in range(0, R + 1, _REQUESTS):
        r = base + tl.arange(0, _REQUESTS)
        begin = tl.load(query_start_loc + r, mask=r <= R, other=T)
        end = tl.load(query_start_loc + r + 1, mask=r < R, other=T)
        firsts = tl.where(r < R, 1, 0)
        tiles = tl.maximum((end - begin + BLOCK_T - 1) // BLOCK_T - firsts, 0)
        ended = (passed + tl.cumsum(tiles, 0) <= number) & (r <= R)
        sequence += tl.sum(ended.to(tl.int32), 0)
        before += tl.sum(tl.where(ended, tiles, 0), 0)
        passed += tl.sum(tiles, 0)
    return sequence, number - before + tl.where(sequence < R, 1, 0)


@jit(do_not_specialize=["T", "R"])
def conv_kernel(
    x,  # [T, C], rows `x_stride` apart
    weight,  # [C, W]
    bias,  # [C]
    states,  # [X, W - 1, C]
    slots,  # [R]
    saves,  # [T]
    query_start_loc,  # [R + 1]
    seq_lens,  # [R]
    y,  # [T, C]
    x_stride,
    T,
    R,
    C: tl.constexpr,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,  # at least W - 1: only a sequence's first tile reads its state
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
):
    """A tile of a sequence's tokens, and of the channels; its first one keeps the new state."""
    if OVERLAP:
        gdc_launch_dependents()
    r = tl.program_id(0)
    tile = tl.full([], 0, tl.int32)
    if r >= R:
        r, tile = _later_tile(r - R, query_start_loc, T, R, BLOCK_T)
    begin = tl.load(query_start_loc + r, mask=r <= R, other=T)
    end = tl.load(query_start_loc + r + 1, mask=r < R, other=T)
    is_anybodys = r < R
    slot = tl.load(slots + r, mask=is_anybodys, other=-1)
    length = tl.load(seq_lens + r, mask=is_anybodys, other=0)
    i = begin + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = i < end
    save = tl.load(saves + i, mask=inside & is_anybodys, other=-1)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = c < C
    if OVERLAP:
        gdc_wait()
    if begin + tile * BLOCK_T >= end:
        return
    out = y + i.to(tl.int64)[:, None] * C + c[None, :]
    written = inside[:, None] & is_channel[None, :]
    if not is_anybodys:
        tl.store(out, tl.zeros((BLOCK_T, BLOCK_C), y.dtype.element_ty), mask=written)
        return
    has_before = (slot >= 0) & (length > end - begin)
    old = states + tl.maximum(slot, 0).to(tl.int64) * ((W - 1) * C) + c[None, :]
    saved = states + save.to(tl.int64)[:, None] * ((W - 1) * C) + c[None, :]
    is_saved = (save >= 0)[:, None] & is_channel[None, :]
    columns = x + begin.to(tl.int64) * x_stride + c[None, :]
    first = tile * BLOCK_T + tl.arange(0, BLOCK_T) - (W - 1)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for w in tl.static_range(W):
        taken = _inputs(columns, old, first + w, inside, has_before, is_channel, x_stride, C, W)
        tap = tl.load(weight + c * W + w, mask=is_channel, other=0.0).to(tl.float32)
        total += tap[None, :] * taken.to(tl.float32)
        if w > 0:
            tl.store(saved + (w - 1) * C, taken, mask=is_saved)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if HAS_SILU:
        total = act(total, 0)
    tl.store(out, total.to(y.dtype.element_ty), mask=written)
    if (tile == 0) & (slot >= 0):
        j = tl.arange(0, BLOCK_W)
        last = end - begin - (W - 1) + j
        kept = _inputs(columns, old, last, j < W - 1, has_before, is_channel, x_stride, C, W)
        tl.debug_barrier()  # the whole program's reads of the state before what replaces it
        tl.store(old + j[:, None] * C, kept, mask=(j < W - 1)[:, None] & is_channel[None, :])


@triton.jit
def _inputs(
    x, state, at, is_wanted, has_before, is_channel, x_stride, C: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """A sequence's inputs [N, BLOCK_C] at places `at` [N] in it: negative ones are in its state."""
    here = (is_wanted & (at >= 0))[:, None] & is_channel[None, :]
    before = (is_wanted & (at < 0) & has_before)[:, None] & is_channel[None, :]
    new = tl.load(x + at.to(tl.int64)[:, None] * x_stride, mask=here, other=0.0)
    old = tl.load(state + (at + W - 1)[:, None] * C, mask=before, other=0.0)
    return tl.where(before, old, new)


@jit(do_not_specialize=["T", "R"])
def delta_kernel(
    qkv,  # [T, 2 * HK * D + HV * DV], rows `qkv_stride` apart
    gates,  # [T, 2 * HV], rows `gates_stride` apart
    decay,  # [HV]
    time_bias,  # [HV]
    states,  # [X, HV, D, DV]
    slots,  # [R]
    saves,  # [T]
    query_start_loc,  # [R + 1]
    seq_lens,  # [R]
    y,  # [T, HV * DV]
    qkv_stride,
    gates_stride,
    T,
    R,
    HK: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MOST: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
):
    """A sequence's tokens one by one, on columns of a head's state that stay in registers.

    Of those with up to MOST tokens: others are `delta_chunks`'s. The programs of sequence R write
    zeros to the rows that belong to none.
    """
    if OVERLAP:
        gdc_launch_dependents()
    tiles: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    r = tl.program_id(1)
    head = tl.program_id(0) // tiles
    d = tl.arange(0, BLOCK_D)
    v = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    is_key = d < D
    is_value = v < DV
    begin, count, slot, has_before = _sequence(r, R, slots, query_start_loc, seq_lens)
    is_done = (count > 0) & (count <= MOST)
    rate = tl.load(decay + head)
    bias = tl.load(time_bias + head)
    of_slot = states + tl.maximum(slot, 0).to(tl.int64) * (HV * D * DV)
    part = head * (D * DV) + d[:, None] * DV + v[None, :]
    is_part = is_key[:, None] & is_value[None, :]
    if has_before & is_done:
        # A line for each row of the part: what is past the last row, or column, is not asked for.
        column = tl.program_id(0) % tiles * BLOCK_V
        bring_to_l2(of_slot + head * (D * DV) + tl.minimum(d, D - 1) * DV + column)
    if OVERLAP:
        gdc_wait()
    out = y + head * DV + v
    if r == R:
        _write_zeros(out, begin, T, HV * DV, is_value)
        return
    if not is_done:
        return
    state = tl.load(of_slot + part, mask=is_part & has_before, other=0.0)
    row = qkv + begin.to(tl.int64) * qkv_stride
    of_key = row + head // (HV // HK) * D + d
    of_value = row + 2 * HK * D + head * DV + v
    of_head = gates + begin.to(tl.int64) * gates_stride + head
    out += begin.to(tl.int64) * (HV * DV)
    for t in range(count):
        query = tl.load(of_key, mask=is_key, other=0.0).to(tl.float32)
        key = tl.load(of_key + HK * D, mask=is_key, other=0.0).to(tl.float32)
        value = tl.load(of_value, mask=is_value, other=0.0).to(tl.float32)
        beta = sigmoid(tl.load(of_head).to(tl.float32)).to(gates.dtype.element_ty).to(tl.float32)
        step = softplus(tl.load(of_head + HV).to(tl.float32) + bias)
        save = tl.load(saves + begin + t)
        query *= D**-0.5 * tl.rsqrt(tl.sum(query * query, axis=0) + 1e-6)
        key *= tl.rsqrt(tl.sum(key * key, axis=0) + 1e-6)
        state *= tl.exp(rate * step)
        delta = beta * (value - tl.sum(key[:, None] * state, axis=0))
        state += key[:, None] * delta[None, :]
        found = tl.sum(query[:, None] * state, axis=0)
        tl.store(out, found.to(y.dtype.element_ty), mask=is_value)
        if save >= 0:
            tl.store(states + save.to(tl.int64) * (HV * D * DV) + part, state, mask=is_part)
        of_key += qkv_stride
        of_value += qkv_stride
        of_head += gates_stride
        out += HV * DV
    if slot >= 0:
        tl.debug_barrier()  # the whole program's reads of the state before what replaces it
        tl.store(of_slot + part, state, mask=is_part)


@jit(do_not_specialize=["T", "R"])
def state_space_kernel(
    xbc,  # [T, H * P + 2 * G * N], rows `xbc_stride` apart
    dt,  # [T, H], rows `dt_stride` apart
    decay,  # [H]
    time_bias,  # [H]
    skip,  # [H]
    states,  # [X, H, N, P]
    slots,  # [R]
    saves,  # [T]
    query_start_loc,  # [R + 1]
    seq_lens,  # [R]
    y,  # [T, H * P]
    xbc_stride,
    dt_stride,
    T,
    R,
    G: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
):
    """As `delta_kernel`, of any number of tokens."""
    if OVERLAP:
        gdc_launch_dependents()
    tiles: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    r = tl.program_id(1)
    head = tl.program_id(0) // tiles
    n = tl.arange(0, BLOCK_N)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    is_row = n < N
    is_column = p < P
    begin, count, slot, has_before = _sequence(r, R, slots, query_start_loc, seq_lens)
    rate = tl.load(decay + head)
    bias = tl.load(time_bias + head)
    passed_on = tl.load(skip + head)
    of_slot = states + tl.maximum(slot, 0).to(tl.int64) * (H * N * P)
    part = head * (N * P) + n[:, None] * P + p[None, :]
    is_part = is_row[:, None] & is_column[None, :]
    if has_before:
        column = tl.program_id(0) % tiles * BLOCK_P
        bring_to_l2(of_slot + head * (N * P) + tl.minimum(n, N - 1) * P + column)
    if OVERLAP:
        gdc_wait()
    out = y + head * P + p
    if r == R:
        _write_zeros(out, begin, T, H * P, is_column)
        return
    if count <= 0:
        return
    state = tl.load(of_slot + part, mask=is_part & has_before, other=0.0)
    row = xbc + begin.to(tl.int64) * xbc_stride
    of_input = row + head * P + p
    of_b = row + H * P + head // (H // G) * N + n
    of_time = dt + begin.to(tl.int64) * dt_stride + head
    out += begin.to(tl.int64) * (H * P)
    for t in range(count):
        x = tl.load(of_input, mask=is_column, other=0.0).to(tl.float32)
        b = tl.load(of_b, mask=is_row, other=0.0).to(tl.float32)
        c = tl.load(of_b + G * N, mask=is_row, other=0.0).to(tl.float32)
        step = softplus(tl.load(of_time).to(tl.float32) + bias)
        save = tl.load(saves + begin + t)
        state = state * tl.exp(rate * step) + b[:, None] * (step * x)[None, :]
        found = tl.sum(c[:, None] * state, axis=0) + passed_on * x
        tl.store(out, found.to(y.dtype.element_ty), mask=is_column)
        if save >= 0:
            tl.store(states + save.to(tl.int64) * (H * N * P) + part, state, mask=is_part)
        of_input += xbc_stride
        of_b += xbc_stride
        of_time += dt_stride
        out += H * P
    if slot >= 0:
        tl.debug_barrier()  # the whole program's reads of the state before what replaces it
        tl.store(of_slot + part, state, mask=is_part)


@triton.jit
def softplus(x):
    # log(1 + u) as Kahan has it, who loses no small u
    u = tl.exp(-tl.abs(x))
    above = 1.0 + u
    is_lost = above == 1.0
    share = u / tl.where(is_lost, 1.0, above - 1.0)
    return tl.maximum(x, 0.0) + tl.where(is_lost, u, tl.log(above) * share)


@jit
def gated_norm_kernel(
    x,  # [T, H * D], rows `x_stride` apart
    gate,  # [T, H * D], rows `gate_stride` apart
    weight,  # [D]
    y,  # [T, H * D]
    x_stride,
    gate_stride,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_ROUNDED: tl.constexpr,  # the product with the weight
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK_D)
    inside = (head < H)[:, None] & (d < D)[None, :]
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    at = head[:, None] * D + d[None, :]
    h = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, axis=1) / D + eps)
    normed = (h * scale[:, None]).to(x.dtype.element_ty).to(tl.float32) * w[None, :]
    if IS_ROUNDED:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(y + row * (H * D) + at, (normed * act(g, 0)).to(y.dtype.element_ty), mask=inside)


@jit
def norm_of_gated_kernel(
    x,  # [T, N], rows `x_stride` apart
    gate,  # [T, N], rows `gate_stride` apart
    weight,  # [N]
    y,  # [T, N]
    x_stride,
    gate_stride,
    eps,
    N: tl.constexpr,
    SIZE: tl.constexpr,  # of a group, of which each program has one
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < SIZE
    at = tl.program_id(1) * SIZE + place
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    h = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    h *= act(tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32), 0)
    normed = h * tl.rsqrt(tl.sum(h * h, axis=0) / SIZE + eps)
    out = normed.to(x.dtype.element_ty).to(tl.float32) * w
    tl.store(y + row * N + at, out.to(y.dtype.element_ty), mask=inside)


@jit
def sigmoid_gate_kernel(
    x,  # [T, N], rows `x_stride` apart
    gate,  # [T, N / RUN], rows `gate_stride` apart
    y,  # [T, N]
    x_stride,
    gate_stride,
    N: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    values = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + at // RUN, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * N + at, (values * sigmoid(g)).to(y.dtype.element_ty), mask=inside)
