"""Rows of what reads and writes each element once: their floor is the traffic alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from device_bench.peers import naive_peer
from device_bench.row import Bench, Case, Row, check_close, check_equal, tolerance
from device_bench.timing import Call
from streamserve_kernels import Kernels

_BLOCK_SIZE = 32
_COPIED_BLOCKS = 16


def rows(quick: bool) -> list[Row]:
    made = [
        Row("elementwise", f"{name}, {count} rows", _sized(build, count))
        for name, build in (
            ("rms_norm + residual", _rms_norm),
            ("layer_norm + residual", _layer_norm),
            ("rotary_write_kv", _rotary_write_kv),
            ("gated_activation", _gated_activation),
            ("embedding", _embedding),
        )
        for count in ((64,) if quick else (64, 2048))
    ]
    return [*made, Row("elementwise", f"copy_blocks, {_COPIED_BLOCKS} in each cache", _copy_blocks)]


def _sized(build: Callable[[Bench, int], Case], count: int) -> Callable[[Bench], Case]:
    return lambda bench: build(bench, max(2, bench.sizes.tokens(count)))


def _case(
    bench: Bench,
    make: Callable[[Kernels], Call],
    check: Callable[[], None],
    num_bytes: float,
) -> Case:
    """`make` binds one set of buffers to a backend's function."""
    return Case(
        calls=bench.rotated(lambda: make(bench.kernels), num_bytes),
        check=check,
        num_bytes=num_bytes,
        peers=naive_peer(bench, lambda: make(bench.naive), num_bytes),
    )


def _rms_norm(bench: Bench, count: int) -> Case:
    hidden = bench.sizes.hidden
    weight = bench.randn(hidden)

    def make(kernels: Kernels) -> Call:
        x, residual = bench.randn(count, hidden), bench.randn(count, hidden)
        return lambda: kernels.rms_norm(x, weight, 1e-5, residual)

    def check() -> None:
        x, residual = bench.randn(count, hidden), bench.randn(count, hidden)
        ours = bench.kernels.rms_norm(x.clone(), weight, 1e-5, residual.clone())
        theirs = bench.naive.rms_norm(x, weight, 1e-5, residual)
        for what, actual, expected in zip(("norm", "residual"), ours, theirs, strict=True):
            check_close(actual, expected, tolerance(bench.dtype), what)

    return _case(bench, make, check, 4 * count * hidden * bench.dtype.itemsize)


def _layer_norm(bench: Bench, count: int) -> Case:
    hidden = bench.sizes.hidden
    weight, bias = bench.randn(hidden), bench.randn(hidden)

    def make(kernels: Kernels) -> Call:
        x, residual = bench.randn(count, hidden), bench.randn(count, hidden)
        return lambda: kernels.layer_norm(x, weight, bias, 1e-5, residual)

    def check() -> None:
        x, residual = bench.randn(count, hidden), bench.randn(count, hidden)
        ours = bench.kernels.layer_norm(x.clone(), weight, bias, 1e-5, residual.clone())
        theirs = bench.naive.layer_norm(x, weight, bias, 1e-5, residual)
        for what, actual, expected in zip(("norm", "residual"), ours, theirs, strict=True):
            check_close(actual, expected, tolerance(bench.dtype), what)

    return _case(bench, make, check, 4 * count * hidden * bench.dtype.itemsize)


def _rotary_write_kv(bench: Bench, count: int) -> Case:
    sizes = bench.sizes
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
        caches = bench.randn(*shape), bench.randn(*shape)
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
            check_close(actual, expected, tolerance(bench.dtype), what)

    # Query and key are read and rotated in place, key and value are written to the cache as well.
    written = sizes.heads + sizes.kv_heads + 2 * sizes.kv_heads
    num_bytes = count * size * (heads + written) * bench.dtype.itemsize
    return _case(bench, make, check, num_bytes)


def _gated_activation(bench: Bench, count: int) -> Case:
    width = bench.sizes.intermediate

    def make(kernels: Kernels) -> Call:
        x = bench.randn(count, 2 * width)
        return lambda: kernels.gated_activation(x, "silu")

    def check() -> None:
        x = bench.randn(count, 2 * width)
        expected = bench.naive.gated_activation(x, "silu")
        check_close(bench.kernels.gated_activation(x, "silu"), expected, tolerance(bench.dtype))

    return _case(bench, make, check, 3 * count * width * bench.dtype.itemsize)


def _embedding(bench: Bench, count: int) -> Case:
    sizes = bench.sizes
    table = bench.randn(sizes.vocab, sizes.hidden)

    def make(kernels: Kernels) -> Call:
        ids = torch.randint(sizes.vocab, (count,), device=bench.device)
        return lambda: kernels.embedding(ids, table)

    def check() -> None:
        ids = torch.randint(sizes.vocab, (count,), device=bench.device)
        check_equal(bench.kernels.embedding(ids, table), bench.naive.embedding(ids, table))

    return _case(bench, make, check, 2 * count * sizes.hidden * bench.dtype.itemsize)


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
    return _case(bench, make, check, 2 * one_cache * len(caches))
