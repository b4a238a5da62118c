"""Rows of layers with a state of constant size, at the sizes of Qwen3-Next 80B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from device_bench.elementwise_rows import case_of, sized
from device_bench.row import Bench, Case, Row, check_close, tolerance
from device_bench.timing import Call
from streamserve_kernels import Kernels
from streamserve_kernels.recurrent import StepStates

_WIDTH = 4  # of the convolution
# Tokens of each sequence of a step; those with one go on, others begin.
_STEPS = {
    "decode 64": (1,) * 64,
    "decode 1": (1,),
    "prompt of 2048": (2048,),
    "63 decodes and a chunk of 512": (*(1,) * 63, 512),
}


def rows(quick: bool) -> list[Row]:
    steps = list(_STEPS)[:1] if quick else list(_STEPS)
    made = [
        Row("recurrent", f"{name}, {step}", partial(build, counts=_STEPS[step]))
        for name, build in (
            ("causal_conv", _conv),
            ("gated_delta_rule", _delta),
            ("state_space_scan", _state_space),
        )
        for step in steps
    ]
    return made + [
        Row("recurrent", f"{name}, {count} rows", sized(of_rows, count))
        for name, of_rows in (
            ("gated_rms_norm", _norm),
            ("norm_of_gated", _norm_behind),
            ("sigmoid_gate", _gate),
        )
        for count in ((64,) if quick else (64, 2048))
    ]


class _Step:
    """Where a step's sequences are: each in the slot of its own number, and every one is kept."""

    def __init__(self, bench: Bench, counts: Sequence[int]) -> None:
        few = max(1, sum(count == 1 for count in counts) // bench.sizes.fewer_requests)
        longer = [bench.sizes.tokens(count) for count in counts if count > 1]
        counts = [*[1] * (few if 1 in counts else 0), *longer]
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self.num_seqs, self.num_tokens = len(counts), starts[-1]
        step = StepStates(bench.ints(range(len(counts))), bench.ints([-1] * self.num_tokens))
        lengths = [count + (count == 1) for count in counts]
        self.where = step, bench.ints(starts), bench.ints(lengths)
        # Of the states, what is read and written: those that begin are only written.
        self.num_moves = len(counts) + counts.count(1)


def _conv(bench: Bench, counts: Sequence[int]) -> Case:
    sizes, step = bench.sizes, _Step(bench, counts)
    channels = 2 * sizes.heads * sizes.head_size
    weight = bench.randn(channels, _WIDTH)

    def make(kernels: Kernels) -> Call:
        x, states = (
            bench.randn(step.num_tokens, channels),
            bench.randn(step.num_seqs, _WIDTH - 1, channels),
        )
        return lambda: (
            kernels.causal_conv(x, weight, None, states, *step.where, activation="silu"),
            states,
        )

    moved = 2 * step.num_tokens + (_WIDTH - 1) * step.num_moves
    num_bytes = moved * channels * bench.dtype.itemsize
    return case_of(bench, make, _check(bench, make), num_bytes)


def _delta(bench: Bench, counts: Sequence[int]) -> Case:
    sizes, step = bench.sizes, _Step(bench, counts)
    heads, size = sizes.heads, sizes.head_size
    columns = 2 * heads * size  # half as many heads of queries and of keys
    rates = -torch.rand(heads, device=bench.device), torch.zeros(heads, device=bench.device)

    def make(kernels: Kernels) -> Call:
        qkv, gates = bench.randn(step.num_tokens, columns), bench.randn(step.num_tokens, 2 * heads)
        states = bench.randn(step.num_seqs, heads, size, size).float()
        return lambda: (
            kernels.gated_delta_rule(
                qkv, gates, *rates, states, *step.where, num_key_heads=heads // 2
            ),
            states,
        )

    of_tokens = step.num_tokens * (columns + heads * size) * bench.dtype.itemsize
    num_bytes = of_tokens + step.num_moves * 4 * heads * size * size
    flops = 6 * step.num_tokens * heads * size * size
    case = case_of(bench, make, _check(bench, make), num_bytes)
    return Case(case.calls, case.check, case.num_bytes, flops, peers=case.peers)


def _state_space(bench: Bench, counts: Sequence[int]) -> Case:
    """One group, whose B and C are as long as a head."""
    sizes, step = bench.sizes, _Step(bench, counts)
    heads, size = sizes.heads, sizes.head_size
    columns = (heads + 2) * size
    rates = -torch.rand(heads, device=bench.device), torch.zeros(heads, device=bench.device)
    skip = torch.ones(heads, device=bench.device)

    def make(kernels: Kernels) -> Call:
        xbc, dt = bench.randn(step.num_tokens, columns), bench.randn(step.num_tokens, heads)
        states = bench.randn(step.num_seqs, heads, size, size).float()
        return lambda: (
            kernels.state_space_scan(xbc, dt, *rates, skip, states, *step.where, num_groups=1),
            states,
        )

    of_tokens = step.num_tokens * (columns + heads * size) * bench.dtype.itemsize
    num_bytes = of_tokens + step.num_moves * 4 * heads * size * size
    flops = 4 * step.num_tokens * heads * size * size
    case = case_of(bench, make, _check(bench, make), num_bytes)
    return Case(case.calls, case.check, case.num_bytes, flops, peers=case.peers)


def _check(bench: Bench, make: Callable[[Kernels], Call]) -> Callable[[], None]:
    """What a call gives, with the states that it leaves, against the same of the naive twin."""

    def check() -> None:
        torch.manual_seed(0)
        ours = make(bench.kernels)()
        torch.manual_seed(0)
        theirs = make(bench.naive)()
        for number, (actual, expected) in enumerate(zip(ours, theirs, strict=True)):
            check_close(actual, expected, tolerance(bench.dtype), f"result {number}")

    return check


def _norm(bench: Bench, count: int) -> Case:
    sizes = bench.sizes
    weight = bench.randn(sizes.head_size)

    def make(kernels: Kernels) -> Call:
        x, gate = (bench.randn(count, sizes.heads * sizes.head_size) for _ in range(2))
        return lambda: (kernels.gated_rms_norm(x, gate, weight, 1e-6),)

    return _of_rows(bench, make, count)


def _norm_behind(bench: Bench, count: int) -> Case:
    size = bench.sizes.heads * bench.sizes.head_size
    weight = bench.randn(size)

    def make(kernels: Kernels) -> Call:
        x, gate = (bench.randn(count, size) for _ in range(2))
        return lambda: (kernels.norm_of_gated(x, gate, weight, 1e-6, size),)

    return _of_rows(bench, make, count)


def _gate(bench: Bench, count: int) -> Case:
    sizes = bench.sizes

    def make(kernels: Kernels) -> Call:
        x, gate = (bench.randn(count, sizes.heads * sizes.head_size) for _ in range(2))
        return lambda: (kernels.sigmoid_gate(x, gate),)

    return _of_rows(bench, make, count)


def _of_rows(bench: Bench, make: Callable[[Kernels], Call], count: int) -> Case:
    sizes = bench.sizes
    num_bytes = 3 * count * sizes.heads * sizes.head_size * bench.dtype.itemsize
    return case_of(bench, make, _check(bench, make), num_bytes)
