"""Ragged steps for layers with a state of constant size: NaN wherever nothing may be read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from streamserve_kernels import Kernels
from streamserve_kernels.recurrent import StepStates
from tests.kernels.test_layers import normal

NAN = float("nan")
# (tokens before the step, tokens in it)
RAGGED = [(0, 1), (5, 1), (0, 70), (33, 17), (10, 0), (4, 2), (0, 3), (90, 1), (1, 33), (0, 2)]
DECODES = [(7 + i, 1) for i in range(9)]
NO_SLOT = (0, 7)  # of RAGGED: a new sequence and a decode that keep nothing
# Of two tokens, the second a draft, what is behind the first; of many also behind two in a row.
SAVES = ((0, 0), (2, 0), (2, 31), (2, 32), (2, 69), (3, 16), (5, 0), (7, 0), (8, 5))


@dataclass(frozen=True)
class Step:
    """A step's indices, and rows behind the last sequence."""

    states: StepStates
    query_start_loc: Tensor
    seq_lens: Tensor
    num_slots: int
    padding: int

    @property
    def num_rows(self) -> int:
        return int(self.query_start_loc[-1]) + self.padding

    def written(self) -> list[int]:
        """Slots that the step writes."""
        named = torch.cat([self.states.slots, self.states.saves])
        written: list[int] = named[named >= 0].tolist()
        return written

    def kept(self) -> list[int]:
        """Slots of sequences that have begun before."""
        counts = self.query_start_loc.diff()
        continued = (self.states.slots >= 0) & (self.seq_lens > counts)
        kept: list[int] = self.states.slots[continued].tolist()
        return kept

    def of_sequence(self, r: int) -> Step:
        """The same sequence alone, in the same slots."""
        begin, end = self.query_start_loc[r : r + 2].tolist()
        states = StepStates(self.states.slots[r : r + 1], self.states.saves[begin:end])
        starts = torch.tensor([0, end - begin], dtype=torch.int32)
        return replace(
            self,
            states=states,
            query_start_loc=starts,
            seq_lens=self.seq_lens[r : r + 1],
            padding=0,
        )

    def rows(self) -> list[slice]:
        """Each sequence's."""
        return [slice(*pair) for pair in pairwise(self.query_start_loc.tolist())]


def step_of(
    sequences: list[tuple[int, int]],
    saves: tuple[tuple[int, int], ...] = (),
    without_slot: tuple[int, ...] = (),
    padding: int = 0,
) -> Step:
    """Slots are shuffled, and some are nobody's; `saves` are (sequence, token of its own)."""
    starts = list(accumulate((count for _, count in sequences), initial=0))
    num_slots = len(sequences) + len(saves) + 2
    shuffled = torch.randperm(num_slots, generator=torch.Generator().manual_seed(1)).int()
    slots, spare = shuffled[: len(sequences)], shuffled[len(sequences) :]
    slots[list(without_slot)] = -1
    kept = torch.full((starts[-1] + padding,), -1, dtype=torch.int32)
    for (r, token), slot in zip(saves, spare, strict=False):
        kept[starts[r] + token] = slot
    lengths = [before + count for before, count in sequences]
    return Step(
        StepStates(slots.contiguous(), kept),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        num_slots,
        padding,
    )


def states_of(step: Step, *shape: int, dtype: torch.dtype) -> Tensor:
    """NaN but for what the step goes on from."""
    states = torch.full((step.num_slots, *shape), NAN, dtype=dtype)
    kept = step.kept()
    states[kept] = normal(7, len(kept), *shape, dtype=dtype)
    return states


def rows_of(step: Step, width: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Columns of wider rows; NaN beside them and behind the last sequence."""
    wide = torch.full((step.num_rows, width + 7), NAN, dtype=dtype)
    rows = wide[:, 3 : 3 + width]
    used = step.num_rows - step.padding
    rows[:used] = normal(seed, used, width)
    return rows


@dataclass(frozen=True)
class Convolution:
    """Arguments of `causal_conv`."""

    step: Step
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str | None
    states: Tensor

    def run(self, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """y and the states after it."""
        states = self.states.clone()
        y = kernels.causal_conv(
            self.x,
            self.weight,
            self.bias,
            states,
            self.step.states,
            self.step.query_start_loc,
            self.step.seq_lens,
            activation=self.activation,
        )
        return y, states

    def part(self, step: Step, rows: slice) -> Convolution:
        """The same weights in another step, of some of the rows."""
        return replace(self, step=step, x=self.x[rows])


def convolution(
    step: Step,
    channels: int,
    width: int,
    dtype: torch.dtype,
    *,
    with_bias: bool = False,
    activation: str | None = "silu",
) -> Convolution:
    return Convolution(
        step,
        rows_of(step, channels, 1, dtype),
        normal(2, channels, width, dtype=dtype),
        normal(3, channels, dtype=dtype) if with_bias else None,
        activation,
        states_of(step, width - 1, channels, dtype=dtype),
    )


@dataclass(frozen=True)
class DeltaRule:
    """Arguments of `gated_delta_rule`."""

    step: Step
    qkv: Tensor
    gates: Tensor
    decay: Tensor
    time_bias: Tensor
    states: Tensor
    num_key_heads: int

    def run(self, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """y and the states after it."""
        states = self.states.clone()
        y = kernels.gated_delta_rule(
            self.qkv,
            self.gates,
            self.decay,
            self.time_bias,
            states,
            self.step.states,
            self.step.query_start_loc,
            self.step.seq_lens,
            num_key_heads=self.num_key_heads,
        )
        return y, states

    def part(self, step: Step, rows: slice) -> DeltaRule:
        """The same weights in another step, of some of the rows."""
        return replace(self, step=step, qkv=self.qkv[rows], gates=self.gates[rows])


def delta_rule(
    step: Step, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype
) -> DeltaRule:
    """`heads` are Hk and Hv, `sizes` D and Dv."""
    (num_key_heads, num_heads), (key_size, value_size) = heads, sizes
    gates = rows_of(step, 2 * num_heads, 2, dtype)
    gates *= 3
    gates[:, :num_heads][_is_near_a_tie(gates[:, :num_heads].double().sigmoid())] = 0
    return DeltaRule(
        step,
        rows_of(step, 2 * num_key_heads * key_size + num_heads * value_size, 1, dtype),
        gates,
        -normal(3, num_heads).abs() * 2,
        normal(4, num_heads),
        states_of(step, num_heads, key_size, value_size, dtype=torch.float32),
        num_key_heads,
    )


@dataclass(frozen=True)
class StateSpace:
    """Arguments of `state_space_scan`."""

    step: Step
    xbc: Tensor
    dt: Tensor
    decay: Tensor
    time_bias: Tensor
    skip: Tensor
    states: Tensor
    num_groups: int

    def run(self, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """y and the states after it."""
        states = self.states.clone()
        y = kernels.state_space_scan(
            self.xbc,
            self.dt,
            self.decay,
            self.time_bias,
            self.skip,
            states,
            self.step.states,
            self.step.query_start_loc,
            self.step.seq_lens,
            num_groups=self.num_groups,
        )
        return y, states

    def part(self, step: Step, rows: slice) -> StateSpace:
        """The same weights in another step, of some of the rows."""
        return replace(self, step=step, xbc=self.xbc[rows], dt=self.dt[rows])


def state_space(
    step: Step, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype
) -> StateSpace:
    """`heads` are G and H, `sizes` N and P; inputs and time steps are columns of the same rows."""
    (num_groups, num_heads), (size, head_size) = heads, sizes
    inner, width = num_heads * head_size, num_groups * size
    wide = rows_of(step, inner + 2 * width + num_heads, 1, dtype)
    wide[:, inner : inner + 2 * width] *= size**-0.5
    xbc, dt = wide.split_with_sizes([inner + 2 * width, num_heads], 1)
    return StateSpace(
        step,
        xbc,
        dt,
        -normal(3, num_heads).abs() * 2,
        normal(4, num_heads),
        normal(5, num_heads),
        states_of(step, num_heads, size, head_size, dtype=torch.float32),
        num_groups,
    )


def _is_near_a_tie(x: Tensor) -> Tensor:
    """What two exact functions may round to two neighbours of bfloat16."""
    return ((x.float().view(torch.int32) & 0xFFFF) - 0x8000).abs() < 64


def assert_close(
    got: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    case: Convolution | DeltaRule | StateSpace,
    *,
    rtol: float,
    atol: float = 4e-6,
) -> None:
    """y within its rounding, zeros behind the last sequence, states within those of float32."""
    torch.testing.assert_close(got[0], expected[0], atol=atol, rtol=rtol)
    assert not got[0][case.step.num_rows - case.step.padding :].any()
    torch.testing.assert_close(got[1], expected[1], atol=4e-6, rtol=1e-5, equal_nan=True)
