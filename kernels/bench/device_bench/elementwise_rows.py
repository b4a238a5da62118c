"""Rows of what reads and writes each element once: their floor is the traffic alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from device_bench.peers import naive_peer
from device_bench.row import Bench, Case, Row, check_close, check_equal, tolerance
from device_bench.timing import Call
from streamserve_kernels import Kernels


def rows(quick: bool) -> list[Row]:
    made = [
        Row("elementwise", f"{name}, {count} rows", sized(build, count))
        for name, build in (
            ("rms_norm + residual", _rms_norm),
            ("layer_norm + residual", _layer_norm),
            ("gated_activation", _gated_activation),
            ("activation", _activation),
            ("add_shared_experts", _add_shared_experts),
            ("embedding", _embedding),
            ("side_by_side", _side_by_side),
            ("resolve_tokens", _resolve_tokens),
        )
        for count in ((64,) if quick else (64, 2048))
    ]
    return made if not quick else [row for row in made if "resolve" not in row.name]


def sized(build: Callable[[Bench, int], Case], count: int) -> Callable[[Bench], Case]:
    return lambda bench: build(bench, max(2, bench.sizes.tokens(count)))


def case_of(
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

    return case_of(bench, make, check, 4 * count * hidden * bench.dtype.itemsize)


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

    return case_of(bench, make, check, 4 * count * hidden * bench.dtype.itemsize)


def _side_by_side(bench: Bench, count: int) -> Case:
    hidden = bench.sizes.hidden

    def make(kernels: Kernels) -> Call:
        parts = (bench.randn(count, hidden), bench.randn(count, hidden))
        return lambda: kernels.side_by_side(parts)

    def check() -> None:
        parts = (bench.randn(count, hidden), bench.randn(count, hidden))
        check_equal(bench.kernels.side_by_side(parts), bench.naive.side_by_side(parts))

    return case_of(bench, make, check, 4 * count * hidden * bench.dtype.itemsize)


def _gated_activation(bench: Bench, count: int) -> Case:
    width = bench.sizes.intermediate

    def make(kernels: Kernels) -> Call:
        x = bench.randn(count, 2 * width)
        return lambda: kernels.gated_activation(x, "silu")

    def check() -> None:
        x = bench.randn(count, 2 * width)
        expected = bench.naive.gated_activation(x, "silu")
        check_close(bench.kernels.gated_activation(x, "silu"), expected, tolerance(bench.dtype))

    return case_of(bench, make, check, 3 * count * width * bench.dtype.itemsize)


def _activation(bench: Bench, count: int) -> Case:
    width = bench.sizes.intermediate

    def make(kernels: Kernels) -> Call:
        x = bench.randn(count, width)
        return lambda: kernels.activation(x, "gelu")

    def check() -> None:
        x = bench.randn(count, width)
        expected = bench.naive.activation(x, "gelu")
        check_close(bench.kernels.activation(x, "gelu"), expected, tolerance(bench.dtype))

    return case_of(bench, make, check, 2 * count * width * bench.dtype.itemsize)


def _add_shared_experts(bench: Bench, count: int) -> Case:
    hidden = bench.sizes.hidden
    gate = bench.randn(1, hidden) / hidden**0.5

    def drawn() -> tuple[torch.Tensor, ...]:
        chosen, x, shared = (bench.randn(count, hidden) for _ in range(3))
        return chosen, x, gate, shared

    def make(kernels: Kernels) -> Call:
        args = drawn()
        return lambda: kernels.add_shared_experts(*args)

    def check() -> None:
        args = drawn()
        expected = bench.naive.add_shared_experts(*args)
        check_close(bench.kernels.add_shared_experts(*args), expected, tolerance(bench.dtype))

    return case_of(bench, make, check, 4 * count * hidden * bench.dtype.itemsize)


def _embedding(bench: Bench, count: int) -> Case:
    sizes = bench.sizes
    table = bench.randn(sizes.vocab, sizes.hidden)

    def make(kernels: Kernels) -> Call:
        ids = torch.randint(sizes.vocab, (count,), device=bench.device)
        return lambda: kernels.embedding(ids, table)

    def check() -> None:
        ids = torch.randint(sizes.vocab, (count,), device=bench.device)
        check_equal(bench.kernels.embedding(ids, table), bench.naive.embedding(ids, table))

    return case_of(bench, make, check, 2 * count * sizes.hidden * bench.dtype.itemsize)


def _resolve_tokens(bench: Bench, count: int) -> Case:
    """All of a step's ids are still to come, and stay so: what was drawn says it again."""
    waiting = torch.arange(count, device=bench.device) - count  # the last of them comes first

    def make(kernels: Kernels) -> Call:
        ids, last = waiting.clone(), waiting.flip(0)
        return lambda: kernels.resolve_tokens(ids, last)

    def check() -> None:
        last = torch.randint(bench.sizes.vocab, (count,), device=bench.device)
        ours, theirs = waiting.clone(), waiting.clone()
        bench.kernels.resolve_tokens(ours, last)
        bench.naive.resolve_tokens(theirs, last)
        check_equal(ours, theirs)

    return case_of(bench, make, check, 3 * waiting.nbytes)
