"""Layers with a state of constant size on a CPU, timed: `kernels/bench/cpu.py --only states`.

The floor is what must be read and written, at the rate at which a large tensor is updated in place:
of delta rules and state spaces the states, of a convolution its inputs, outputs and states. Many
tokens of one sequence are arithmetic instead, and have no floor here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from streamserve_kernels import Kernels
from streamserve_kernels.recurrent import StepStates

Timed = Callable[[list[Callable[[], object]], float], list[float]]

# Hk, Hv of Qwen 3.5 0.8B and 9B; heads of 128
HEADS = ((16, 16), (16, 32))
# Heads of Granite 4.0 H Tiny and Micro, which share one group
SPACES = ((1, 48), (1, 64))
SIZE = 128  # of keys and values, of a group's B and C
HEAD_SIZE = 64  # of a state space
WIDTH = 4
# (tokens before the step, tokens in it)
STEPS = {
    "1 decode": [(100, 1)],
    "4 decodes": [(100, 1)] * 4,
    "16 decodes": [(100, 1)] * 16,
    "prompt of 128": [(0, 128)],
    "chunk of 512": [(512, 512)],
    "8 decodes, chunk of 64": [*[(100, 1)] * 8, (600, 64)],
}
# The states of so many bytes take turns, or they would be found in a cache.
LEAST_BYTES = 256 << 20


def update_bandwidth(seconds: float) -> float:
    """Bytes per second, read and written, of adding to 256 MiB in place: the best of the rounds."""
    data = torch.ones(2**26)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        data.add_(1)
        best = min(best, time.perf_counter() - start)
    return 2 * data.nbytes / best


def bench_states(kernels: Kernels, naive: Kernels, dtype: torch.dtype, timed: Timed) -> None:
    bandwidth = update_bandwidth(1.0)
    print(f"\nstates are read and written at up to {bandwidth / 1e9:.1f} GB/s")
    print(
        f"{'layers with a state':<24}{'heads':>8}{'':>8}{'µs':>10}{'floor':>9}{'share':>7}"
        f"{'GFLOP/s':>9}{'vs naive':>10}"
    )
    of_rules = (("conv", _convolution), ("rule", _delta_rule))
    kinds = [*((heads, of_rules) for heads in HEADS)]
    kinds += ((heads, (("space", _state_space),)) for heads in SPACES)
    for heads, measures in kinds:
        for name, sequences in STEPS.items():
            for kind, measure in measures:
                ours, theirs, nbytes, flops = measure(
                    kernels, naive, heads, sequences, dtype, timed
                )
                floor = nbytes / bandwidth
                share = f"{floor / ours:.0%}" if all(n == 1 for _, n in sequences) else ""
                print(
                    f"{name:<24}{f'{heads[0]}/{heads[1]}':>8}{kind:>8}{1e6 * ours:>10.1f}"
                    f"{1e6 * floor:>9.1f}{share:>7}{flops / ours / 1e9:>9.0f}"
                    f"{theirs / ours:>9.1f}x"
                )


def _step(sequences: list[tuple[int, int]]) -> tuple[StepStates, Tensor, Tensor]:
    counts = torch.tensor([0] + [count for _, count in sequences])
    slots = torch.arange(len(sequences), dtype=torch.int32)
    saves = torch.full((int(counts.sum()),), -1, dtype=torch.int32)
    lengths = torch.tensor([before + count for before, count in sequences], dtype=torch.int32)
    return StepStates(slots, saves), counts.cumsum(0).int(), lengths


def _channels(heads: tuple[int, int]) -> int:
    return (2 * heads[0] + heads[1]) * SIZE


def _measure(
    call: Callable[[Kernels, Tensor], Tensor],
    kernels: Kernels,
    naive: Kernels,
    state: Tensor,
    dtype: torch.dtype,
    timed: Timed,
) -> tuple[float, float]:
    """Seconds of a call of ours and of the naive twin's; both are checked first."""
    mine, theirs = state.clone(), state.clone()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        call(kernels, mine), call(naive, theirs), atol=tolerance, rtol=tolerance
    )
    torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
    turns = [state.clone() for _ in range(max(1, min(64, LEAST_BYTES // state.nbytes)))]
    ours, twin = timed(
        [lambda: [call(kernels, one) for one in turns], lambda: call(naive, theirs)], 0.3
    )
    return ours / len(turns), twin


def _convolution(
    kernels: Kernels,
    naive: Kernels,
    heads: tuple[int, int],
    sequences: list[tuple[int, int]],
    dtype: torch.dtype,
    timed: Timed,
) -> tuple[float, float, int, int]:
    """Seconds of ours and of the twin's, bytes that must move, operations."""
    channels, (states, starts, lengths) = _channels(heads), _step(sequences)
    x = torch.randn(len(states.saves), channels).to(dtype)
    weight = torch.randn(channels, WIDTH).to(dtype)
    state = torch.randn(len(sequences), WIDTH - 1, channels).to(dtype)

    def call(of: Kernels, state: Tensor) -> Tensor:
        return of.causal_conv(x, weight, None, state, states, starts, lengths, activation="silu")

    seconds = _measure(call, kernels, naive, state, dtype, timed)
    return *seconds, 2 * (x.nbytes + state.nbytes), 2 * WIDTH * x.numel()


def _delta_rule(
    kernels: Kernels,
    naive: Kernels,
    heads: tuple[int, int],
    sequences: list[tuple[int, int]],
    dtype: torch.dtype,
    timed: Timed,
) -> tuple[float, float, int, int]:
    """The same of the gated delta rule: for each element of a state it takes 8 a token."""
    (num_key_heads, num_heads), (states, starts, lengths) = heads, _step(sequences)
    qkv = torch.randn(len(states.saves), _channels(heads)).to(dtype)
    gates = torch.randn(len(qkv), 2 * num_heads).to(dtype)
    decay, time_bias = -torch.rand(num_heads), torch.randn(num_heads)
    state = torch.randn(len(sequences), num_heads, SIZE, SIZE) / 10

    def call(of: Kernels, state: Tensor) -> Tensor:
        return of.gated_delta_rule(
            qkv,
            gates,
            decay,
            time_bias,
            state,
            states,
            starts,
            lengths,
            num_key_heads=num_key_heads,
        )

    seconds = _measure(call, kernels, naive, state, dtype, timed)
    return *seconds, 2 * state.nbytes, 8 * len(qkv) * num_heads * SIZE**2


def _state_space(
    kernels: Kernels,
    naive: Kernels,
    heads: tuple[int, int],
    sequences: list[tuple[int, int]],
    dtype: torch.dtype,
    timed: Timed,
) -> tuple[float, float, int, int]:
    """The same of a state space: for each element of a state it takes 5 a token."""
    (num_groups, num_heads), (states, starts, lengths) = heads, _step(sequences)
    inner = num_heads * HEAD_SIZE
    xbc = torch.randn(len(states.saves), inner + 2 * num_groups * SIZE)
    xbc[:, inner:] *= SIZE**-0.5
    xbc = xbc.to(dtype)
    dt = torch.randn(len(xbc), num_heads).to(dtype)
    decay, time_bias, skip = -torch.rand(num_heads), torch.randn(num_heads), torch.randn(num_heads)
    state = torch.randn(len(sequences), num_heads, SIZE, HEAD_SIZE) / 10

    def call(of: Kernels, state: Tensor) -> Tensor:
        return of.state_space_scan(
            xbc,
            dt,
            decay,
            time_bias,
            skip,
            state,
            states,
            starts,
            lengths,
            num_groups=num_groups,
        )

    seconds = _measure(call, kernels, naive, state, dtype, timed)
    return *seconds, 2 * state.nbytes, 5 * len(xbc) * num_heads * SIZE * HEAD_SIZE
