"""The paged cache: rotation with the write of keys and values in one pass, copies of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from streamserve_kernels.triton.runtime import forget_with, jit, overlaps

_COPIED = 2048  # words of a program of `copy_blocks`
# Up to so many, each head has a program of its own. The programs of more tokens are fewer and
# larger: what comes next cannot begin before the last of them has.
_FEW_TOKENS = 8


@jit
def _store_cached(pointers, values, mask, FLOAT8: tl.constexpr):
    if FLOAT8:  # e4m3 reaches from -448 to 448; past that its conversion may give NaN
        values = tl.minimum(tl.maximum(values.to(tl.float32), -448.0), 448.0)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@jit
def _heads_kernel(
    query, key, value, positions, cos_sin, key_cache, value_cache, slots,
    query_stride, key_stride, value_stride, block_stride, head_stride, value_block_stride,
    value_head_stride, cos_stride,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROT: tl.constexpr, BLOCK_ROT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr, WRITES: tl.constexpr,
    FLOAT8: tl.constexpr, HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A token's heads, HEADS at a time: first those of the query, then of key and value."""
    if OVERLAP:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    query_parts: tl.constexpr = (HQ + HEADS - 1) // HEADS if ROT > 0 else 0
    key_parts: tl.constexpr = (HKV + HEADS - 1) // HEADS
    half: tl.constexpr = ROT // 2
    is_query = part < query_parts
    is_value = part >= query_parts + key_parts
    # A step's inputs and a table may be read before the wait: see `overlaps`.
    if WRITES:
        slot = tl.load(slots + token)
    if ROT > 0:
        i = tl.arange(0, BLOCK_ROT)
        row = tl.load(positions + token) * cos_stride
        # In the heads' shape: numbers of one row would go through shared memory to their threads.
        pairs = tl.broadcast_to(i[None, :], (HEADS, BLOCK_ROT))
        turns = (pairs < half) & (part < query_parts + key_parts)
        cos = tl.load(cos_sin + row + pairs, mask=turns, other=0.0)
        sin = tl.load(cos_sin + row + half + pairs, mask=turns, other=0.0)
    if OVERLAP:
        gdc_wait()
    if ROT > 0:
        if not is_value:
            if INTERLEAVED:
                first, second = 2 * i, 2 * i + 1
            else:
                first, second = i, i + half
            local = tl.where(is_query, part, part - query_parts) * HEADS + tl.arange(0, HEADS)
            count = tl.where(is_query, HQ, HKV)
            mask = (local < count)[:, None] & (i < half)[None, :]
            if is_query:
                base = query + token * query_stride + local[:, None] * D
            else:
                base = key + token * key_stride + local[:, None] * D
            a = tl.load(base + first[None, :], mask=mask, other=0.0).to(tl.float32)
            b = tl.load(base + second[None, :], mask=mask, other=0.0).to(tl.float32)
            rotated = (a * cos - b * sin).to(query.dtype.element_ty)
            turned = (b * cos + a * sin).to(query.dtype.element_ty)
            tl.store(base + first[None, :], rotated, mask=mask)
            tl.store(base + second[None, :], turned, mask=mask)
            if WRITES:
                if not is_query:
                    at = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * D
                    written = mask & (slot >= 0)
                    target = key_cache + at + local[:, None] * head_stride
                    _store_cached(target + first[None, :], rotated, written, FLOAT8)
                    _store_cached(target + second[None, :], turned, written, FLOAT8)
                    if ROT < D:
                        j = tl.arange(0, BLOCK_D)
                        rest = (local < HKV)[:, None] & ((j >= ROT) & (j < D))[None, :]
                        kept = tl.load(base + j[None, :], mask=rest, other=0.0)
                        _store_cached(target + j[None, :], kept, rest & (slot >= 0), FLOAT8)
    elif not is_value:
        local = part * HEADS + tl.arange(0, HEADS)
        j = tl.arange(0, BLOCK_D)
        mask = (local < HKV)[:, None] & (j < D)[None, :]
        kept = tl.load(key + token * key_stride + local[:, None] * D + j[None, :], mask=mask)
        at = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * D
        target = key_cache + at + local[:, None] * head_stride + j[None, :]
        _store_cached(target, kept, mask & (slot >= 0), FLOAT8)
    if WRITES:
        if is_value:
            local = (part - query_parts - key_parts) * HEADS + tl.arange(0, HEADS)
            j = tl.arange(0, BLOCK_DV)
            mask = (local < HKV)[:, None] & (j < DV)[None, :]
            kept = tl.load(
                value + token * value_stride + local[:, None] * DV + j[None, :], mask=mask
            )
            at = slot // BLOCK_SIZE * value_block_stride + slot % BLOCK_SIZE * DV
            target = value_cache + at + local[:, None] * value_head_stride + j[None, :]
            _store_cached(target, kept, mask & (slot >= 0), FLOAT8)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    caches: tuple[Tensor, Tensor] | None,
    slots: Tensor,
    interleaved: bool,
) -> None:
    tokens, num_kv_heads, size = key.shape
    if tokens == 0:
        return
    value_size, num_heads = value.shape[2], query.shape[1]
    rotated = 0 if cos_sin is None else cos_sin.shape[1]
    heads = 1 if tokens <= _FEW_TOKENS else 8
    turned_block = max(triton.next_power_of_2(rotated // 2), 1)
    size_block = triton.next_power_of_2(size)
    # 16 bytes of 16-bit numbers for a thread, or of pairs twice that. A pair belongs to one thread,
    # or warp: another that held a copy of it might read it turned.
    num_warps = min(max(heads * (turned_block if rotated else size_block) // (8 * 32), 1), 4)
    parts = (triton.cdiv(num_heads, heads) if rotated else 0) + triton.cdiv(num_kv_heads, heads)
    if caches is not None:
        parts += triton.cdiv(num_kv_heads, heads)
    key_cache, value_cache = (key, value) if caches is None else caches
    overlap = overlaps(key.device)
    strides = (
        (0, 0, 0, 0) if caches is None else (*key_cache.stride()[:2], *value_cache.stride()[:2])
    )
    _heads_kernel[(tokens, parts)](
        query, key, value, positions, key if cos_sin is None else cos_sin,
        key_cache, value_cache, slots,
        query.stride(0), key.stride(0), value.stride(0), *strides,
        0 if cos_sin is None else cos_sin.stride(0),
        HQ=num_heads, HKV=num_kv_heads, D=size, DV=value_size,
        BLOCK_D=size_block, BLOCK_DV=triton.next_power_of_2(value_size),
        ROT=rotated, BLOCK_ROT=turned_block,
        BLOCK_SIZE=1 if caches is None else key_cache.shape[2],
        INTERLEAVED=interleaved, WRITES=caches is not None,
        FLOAT8=key_cache.dtype == torch.float8_e4m3fn, HEADS=heads, OVERLAP=overlap,
        num_warps=num_warps, launch_pdl=overlap,
    )  # fmt: skip


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See `naive.write_kv`."""
    _run(key, key, value, slot_mapping, None, (key_cache, value_cache), slot_mapping, False)


def rotary_embedding(
    query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See `naive.rotary_embedding`: in place."""
    _run(query, key, key, positions, cos_sin, None, positions, interleaved)
    return query, key


def rotary_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """See `naive.rotary_write_kv`: one launch."""
    caches = (key_cache, value_cache)
    _run(query, key, value, positions, cos_sin, caches, slot_mapping, interleaved)
    return query, key


# Sources and destinations are rows of one table: where the second starts depends on their number.
@jit(do_not_specialize_on_alignment=["src", "dst"])
def _copy_kernel(addresses, src, dst, words, BLOCK: tl.constexpr):
    """Block `src[c]` to `dst[c]` of cache `program_id(1)`, whose block is `words` int64 long."""
    cache = tl.load(addresses + tl.program_id(1)).to(tl.pointer_type(tl.int64))
    source = tl.load(src + tl.program_id(0)).to(tl.int64) * words
    target = tl.load(dst + tl.program_id(0)).to(tl.int64) * words
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < words
    tl.store(cache + target + at, tl.load(cache + source + at, mask=inside), mask=inside)


_addresses: dict[tuple[int, ...], Tensor] = {}


def copy_blocks(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """See `naive.copy_blocks`: a launch for all caches whose blocks are of one size."""
    by_size: dict[int, list[Tensor]] = {}
    for cache in caches:
        by_size.setdefault(cache[0].nbytes, []).append(cache)
    for num_bytes, same in by_size.items():
        if num_bytes == 0 or len(src) == 0:
            continue
        if num_bytes % 8:
            for cache in same:
                cache.view(torch.uint8)[dst] = cache.view(torch.uint8)[src]
            continue
        key = tuple(cache.data_ptr() for cache in same)
        if key not in _addresses:
            _addresses[key] = torch.tensor(key, dtype=torch.int64, device=src.device)
            forget_with(same[0], _addresses, key)
        words = num_bytes // 8
        grid = (len(src), len(same), triton.cdiv(words, _COPIED))
        _copy_kernel[grid](_addresses[key], src, dst, words, BLOCK=_COPIED, num_warps=8)
