"""Rows of what writes the paged cache, copies its blocks, and takes them out and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from device_bench.elementwise_rows import case_of, sized
from device_bench.row import Bench, Case, Row, check_close, check_equal, tolerance
from device_bench.timing import Call
from streamserve_kernels import Kernels
from streamserve_kernels.block_rows import BlockRows, block_rows

_BLOCK_SIZE = 32
_COPIED_BLOCKS = 16
_TOLERANCE_FLOAT8 = 5e-2


def rows(quick: bool) -> list[Row]:
    made = [
        Row("cache", f"rotary_write_kv{name}, {count} rows", sized(build, count))
        for name, build in (
            ("", _rotary_write_kv),
            (", float8", partial(_rotary_write_kv, float8=True)),
        )
        for count in ((64,) if quick else (64, 2048))
    ]
    made.append(Row("cache", f"copy_blocks, {_COPIED_BLOCKS} in each cache", _copy_blocks))
    moves: dict[str, Callable[[Bench], Case]] = {"packed": _packed, "unpacked": _unpacked}
    return made + [Row("cache", f"{_COPIED_BLOCKS} blocks {way}", moves[way]) for way in moves]


def _rotary_write_kv(bench: Bench, count: int, *, float8: bool = False) -> Case:
    sizes = bench.sizes
    cache_dtype = torch.float8_e4m3fn if float8 else bench.dtype
    heads, size = sizes.heads + 2 * sizes.kv_heads, sizes.head_size
    num_blocks = -(-count // _BLOCK_SIZE) + 1
    shape = bench.kernels.kv_cache_shape(num_blocks, _BLOCK_SIZE, sizes.kv_heads, size)
    angles = torch.rand(4096, size // 2, device=bench.device) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.randint(4096, (count,), device=bench.device)
    slots = torch.randperm(num_blocks * _BLOCK_SIZE, device=bench.device)[:count]

    def make(kernels: Kernels) -> Call:
        parts = bench.randn(count, heads, size).split(
            [sizes.heads, sizes.kv_heads, sizes.kv_heads], dim=1
        )
        caches = bench.randn(*shape).to(cache_dtype), bench.randn(*shape).to(cache_dtype)
        return lambda: (
            *kernels.rotary_write_kv(*parts, positions, cos_sin, *caches, slots, interleaved=False),
            *caches,
        )

    def check() -> None:
        torch.manual_seed(0)
        ours = make(bench.kernels)()
        torch.manual_seed(0)
        theirs = make(bench.naive)()
        names = ("query", "key", "key cache", "value cache")
        for what, actual, expected in zip(names, ours, theirs, strict=True):
            # What is rounded to three bits may be rounded to the other side.
            is_rounded = float8 and "cache" in what
            allowed = _TOLERANCE_FLOAT8 if is_rounded else tolerance(bench.dtype)
            check_close(actual, expected, allowed, what)

    # Query and key are read and rotated in place, key and value are written to the cache as well.
    rotated = heads + sizes.heads + sizes.kv_heads
    cached = 2 * sizes.kv_heads * cache_dtype.itemsize
    return case_of(bench, make, check, count * size * (rotated * bench.dtype.itemsize + cached))


def _copy_blocks(bench: Bench) -> Case:
    sizes = bench.sizes
    num_blocks = 4 * _COPIED_BLOCKS
    shape = bench.kernels.kv_cache_shape(num_blocks, _BLOCK_SIZE, sizes.kv_heads, sizes.head_size)
    ids = torch.randperm(num_blocks, device=bench.device)[: 2 * _COPIED_BLOCKS]
    src, dst = (part.contiguous() for part in ids.chunk(2))
    caches = [bench.randn(*shape) for _ in range(2 * sizes.layers)]

    def make(kernels: Kernels) -> Call:
        return lambda: kernels.copy_blocks(caches, src, dst)

    def check() -> None:
        ours, theirs = ([cache.clone() for cache in caches[:4]] for _ in range(2))
        bench.kernels.copy_blocks(ours, src, dst)
        bench.naive.copy_blocks(theirs, src, dst)
        for number, (actual, expected) in enumerate(zip(ours, theirs, strict=True)):
            check_equal(actual, expected, f"cache {number}")

    one_cache = _COPIED_BLOCKS * caches[0][0].numel() * bench.dtype.itemsize
    return case_of(bench, make, check, 2 * one_cache * len(caches))


def _packed(bench: Bench) -> Case:
    return _moved(bench, lambda blocks, ids, rows: blocks.pack(ids, rows))


def _unpacked(bench: Bench) -> Case:
    return _moved(bench, lambda blocks, ids, rows: blocks.unpack(rows, ids))


def _moved(bench: Bench, move: Callable[[BlockRows, torch.Tensor, torch.Tensor], None]) -> Case:
    """A block of every cache as one row, as it goes to the host's memory and comes back."""
    sizes = bench.sizes
    shape = bench.kernels.kv_cache_shape(
        4 * _COPIED_BLOCKS, _BLOCK_SIZE, sizes.kv_heads, sizes.head_size
    )
    caches = [bench.randn(*shape) for _ in range(2 * sizes.layers)]
    ids = torch.randperm(4 * _COPIED_BLOCKS, device=bench.device)[:_COPIED_BLOCKS]
    ours, plain = block_rows(caches), BlockRows(caches)
    rows = torch.zeros(_COPIED_BLOCKS, plain.width, dtype=plain.dtype, device=bench.device)

    def check() -> None:
        packed, twins = torch.zeros_like(rows), torch.zeros_like(rows)
        ours.pack(ids, packed)
        plain.pack(ids, twins)
        check_equal(packed, twins, "packed")
        before = [cache.clone() for cache in caches]
        ours.unpack(packed.flip(0), ids.flip(0))  # what is there already
        for number, (cache, old) in enumerate(zip(caches, before, strict=True)):
            check_equal(cache, old, f"cache {number}")

    return Case(
        calls=[lambda: move(ours, ids, rows)],  # more than the caches of a device hold
        check=check,
        num_bytes=2 * rows.nbytes,
        peers={"plain torch": lambda: [lambda: move(plain, ids, rows)]},
    )
