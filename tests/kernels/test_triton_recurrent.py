"""Layers with a state of constant size against the naive twins: ragged, strided, in captures."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from streamserve_kernels import recurrent as naive
from streamserve_kernels.recurrent import StepStates
from tests.kernels.conftest import TOLERANCE
from tests.kernels.pretended_gpu import capture

pytest.importorskip("triton")
ours = pytest.importorskip("streamserve_kernels.triton")

NUM_SLOTS = 16
# (tokens in the step, tokens before it, has a slot, the tokens whose state another slot keeps)
DECODES = [(1, 5, True, ()), (1, 0, True, (0,)), (1, 9, True, ()), (1, 0, False, ())]
RAGGED = [
    (3, 2, True, (0, 1)),  # a token and two drafts
    (0, 0, True, ()),  # of nobody
    (70, 40, True, (15, 16, 63, 69)),
    (1, 7, True, ()),
    (17, 0, True, (1,)),
    (33, 0, False, (20,)),
    (2, 0, True, ()),
]
CROWDED = [(21, 3, True, (4,)), *[(0, 0, False, ())] * 20]  # as many tokens as sequences
MIXED = [*[(1, 5, False, ())] * 20, (70, 2, True, ())]
STEPS = pytest.mark.parametrize(
    "sequences",
    [DECODES, RAGGED, CROWDED, MIXED],
    ids=["decodes", "ragged", "crowded", "mixed"],
)


@dataclass
class Case:
    """A step: where its sequences are, and how many rows it has with the padding's."""

    step: StepStates
    query_start_loc: Tensor
    seq_lens: Tensor
    num_tokens: int

    @property
    def where(self) -> tuple[StepStates, Tensor, Tensor]:
        return self.step, self.query_start_loc, self.seq_lens


def step_of(sequences: list[tuple], device: torch.device, padding: int = 0) -> Case:
    free = torch.randperm(NUM_SLOTS).tolist()
    counts = [count for count, *_ in sequences]
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    saves = torch.full((starts[-1] + padding,), -1)
    slots = []
    for start, (_, _, has_slot, kept) in zip(starts, sequences, strict=False):
        slots.append(free.pop() if has_slot else -1)
        for token in kept:
            saves[start + token] = free.pop()
    lengths = [count + before for count, before, *_ in sequences]
    ints = [torch.tensor(x).int().to(device) for x in (slots, saves.tolist(), starts, lengths)]
    return Case(StepStates(*ints[:2]), *ints[2:], num_tokens=len(saves))


def states_of(case: Case, *shape: int, dtype: torch.dtype) -> Tensor:
    """NaN but where a sequence goes on from: it may be read from nowhere else."""
    states = torch.full((NUM_SLOTS, *shape), torch.nan)
    counts = case.query_start_loc.diff()
    for slot, length, count in zip(
        case.step.slots.tolist(), case.seq_lens.tolist(), counts.tolist(), strict=True
    ):
        if slot >= 0 and length > count:
            states[slot] = torch.randn(shape)
    return states.to(case.step.slots.device, dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    bounds = TOLERANCE[dtype] if dtype != torch.float32 else {"atol": 2e-5, "rtol": 1e-4}
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, equal_nan=True, **bounds)


def close_states(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Of activations of 16 bits they are sums of products of 11 bits."""
    close(found, expected, torch.float32 if dtype == torch.float32 else torch.bfloat16)


def strided(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A part of each row of what another product gave."""
    return torch.randn(rows, columns + 24).to(device, dtype)[:, 8 : columns + 8]


@STEPS
@pytest.mark.parametrize(
    ("width", "channels", "has_bias", "activation"),
    [(4, 300, False, "silu"), (3, 40, True, None), (2, 256, True, "silu"), (4, 8, False, None)],
)
def test_convolutions(device, dtype, sequences, width, channels, has_bias, activation):
    case = step_of(sequences, device, padding=20 if sequences is RAGGED else 0)
    x = strided(case.num_tokens, channels, device, dtype)
    weight = torch.randn(channels, width).to(device, dtype)
    bias = torch.randn(channels).to(device, dtype) if has_bias else None
    states = states_of(case, width - 1, channels, dtype=dtype)
    before, expected_states = x.clone(), states.clone()
    args = (weight, bias)
    expected = naive.causal_conv(x, *args, expected_states, *case.where, activation=activation)
    found = ours.causal_conv(x, *args, states, *case.where, activation=activation)
    close(found, expected, dtype)
    assert not found[case.query_start_loc[-1] :].any()
    # What a state holds are inputs, which nothing rounds.
    torch.testing.assert_close(states, expected_states, equal_nan=True, rtol=0, atol=0)
    assert x.equal(before)


class Delta:
    """Arguments of `gated_delta_rule`, with queries, keys and values as a product gives them."""

    def __init__(self, case: Case, heads, sizes, device, dtype) -> None:
        (self.num_key_heads, num_heads), (size, value_size) = heads, sizes
        columns = 2 * self.num_key_heads * size + num_heads * value_size
        self.case = case
        self.qkv = strided(case.num_tokens, columns, device, dtype)
        self.gates = 2 * strided(case.num_tokens, 2 * num_heads, device, dtype)
        self.decay = -torch.rand(num_heads).mul(3).exp().to(device) / 4
        self.time_bias = torch.randn(num_heads).to(device)
        self.states = states_of(case, num_heads, size, value_size, dtype=torch.float32)

    def run(self, kernels, states: Tensor) -> Tensor:
        parameters = self.decay, self.time_bias, states
        return kernels.gated_delta_rule(
            self.qkv, self.gates, *parameters, *self.case.where, num_key_heads=self.num_key_heads
        )

    def check(self, dtype: torch.dtype) -> None:
        states, expected_states = self.states.clone(), self.states.clone()
        expected = self.run(naive, expected_states)
        found = self.run(ours, states)
        close(found, expected, dtype)
        assert not found[self.case.query_start_loc[-1] :].any()
        close_states(states, expected_states, dtype)


@STEPS
@pytest.mark.parametrize(
    ("heads", "sizes"),
    [((1, 1), (16, 16)), ((2, 4), (64, 16)), ((1, 3), (128, 24)), ((1, 1), (40, 128))],
    ids=str,
)
def test_delta_rules(device, dtype, sequences, heads, sizes):
    case = step_of(sequences, device, padding=20 if sequences is RAGGED else 0)
    Delta(case, heads, sizes, device, dtype).check(dtype)


@STEPS
@pytest.mark.parametrize(
    ("heads", "sizes"), [((1, 1), (16, 16)), ((2, 4), (40, 24)), ((1, 3), (128, 64))], ids=str
)
def test_state_spaces(device, dtype, sequences, heads, sizes):
    case = step_of(sequences, device, padding=20 if sequences is RAGGED else 0)
    (num_groups, num_heads), (size, head_size) = heads, sizes
    columns = num_heads * head_size + 2 * num_groups * size
    xbc = strided(case.num_tokens, columns, device, dtype)
    dt = 2 * strided(case.num_tokens, num_heads, device, dtype)
    rates = [-torch.rand(num_heads), torch.randn(num_heads), torch.randn(num_heads)]
    rates = [rate.to(device) for rate in rates]
    states = states_of(case, num_heads, size, head_size, dtype=torch.float32)
    expected_states = states.clone()
    expected, found = (
        kernels.state_space_scan(xbc, dt, *rates, mine, *case.where, num_groups=num_groups)
        for kernels, mine in ((naive, expected_states), (ours, states))
    )
    close(found, expected, dtype)
    assert not found[case.query_start_loc[-1] :].any()
    close_states(states, expected_states, torch.float32)


@pytest.mark.parametrize("count", [8, 90])
def test_a_slow_decay_and_a_fast_one(device, dtype, count):
    """Of what exp and softplus are asked for, the ends; and keys that are all the same."""
    case = step_of([(count, 3, True, ()), (1, 3, True, ())], device)
    delta = Delta(case, (1, 2), (16, 16), device, dtype)
    delta.gates[: count // 2] = -25.0
    delta.gates[count // 2 :] = 25.0
    delta.check(dtype)
    delta.gates[:, :2], delta.gates[:, 2:] = 25.0, -25.0
    delta.qkv[:, 16:32] = delta.qkv[0, 16:32]
    delta.check(dtype)
    delta.decay[:], delta.gates[:, 2:] = -1e4, -12.0
    delta.check(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_round_to_the_nearest(device, dtype):
    """The matrix units cut off what they do not take of a state: that would add up."""
    case = step_of([(90, 3, True, (50,)), (1, 3, True, ())], device)
    delta = Delta(case, (1, 2), (16, 16), device, dtype)
    delta.gates[:, :2], delta.gates[:, 2:] = 25.0, -25.0
    delta.qkv[:, 16:32] = delta.qkv[0, 16:32]
    delta.check(dtype)


def test_steps_of_nothing(device, dtype):
    case = step_of([(0, 0, True, ())], device)
    states = states_of(case, 3, 16, dtype=dtype)
    weight = torch.randn(16, 4).to(device, dtype)
    found = ours.causal_conv(weight.T[:0], weight, None, states, *case.where)
    assert found.shape == (0, 16)
    delta = Delta(case, (1, 1), (16, 16), device, dtype)
    assert delta.run(ours, delta.states).shape == (0, 16)
    for function in (ours.sigmoid_gate, lambda x, gate: ours.gated_rms_norm(x, gate, x[0], 1e-6)):
        x = weight.new_zeros(1, 16)
        assert function(x, x)[:0].shape == (0, 16)


def test_a_captured_step_serves_other_sequences(device, dtype):
    """A replay finds other lengths, slots and marks in the same places."""
    first, second = (
        [(40, 3, True, (7,)), (1, 4, True, ()), (2, 0, True, ()), (0, 0, True, ())],
        [(1, 4, True, (0,)), (20, 0, True, ()), (5, 9, False, ()), (13, 30, True, (12,))],
    )
    case, other = step_of(first, device, padding=7), step_of(second, device, padding=11)
    delta = Delta(case, (1, 2), (16, 16), device, dtype)
    states = delta.states.clone()
    conv_states = states_of(case, 2, 64, dtype=dtype)
    weight = torch.randn(64, 3).to(device, dtype)

    def step() -> tuple[Tensor, Tensor]:
        conv = ours.causal_conv(delta.qkv, weight, None, conv_states, *case.where)
        return conv, delta.run(ours, states)

    step()  # compiles
    replay, found = capture(step)
    for name in ("query_start_loc", "seq_lens"):
        getattr(case, name).copy_(getattr(other, name))
    for mine, its in zip(case.step, other.step, strict=True):
        mine.copy_(its)
    states.copy_(states_of(case, 2, 16, 16, dtype=torch.float32))
    conv_states.copy_(states_of(case, 2, 64, dtype=dtype))
    expected_states, expected_conv_states = states.clone(), conv_states.clone()
    replay()
    expected = naive.causal_conv(delta.qkv, weight, None, expected_conv_states, *case.where)
    close(found[0], expected, dtype)
    close(found[1], delta.run(naive, expected_states), dtype)
    torch.testing.assert_close(conv_states, expected_conv_states, equal_nan=True, rtol=0, atol=0)
    close_states(states, expected_states, dtype)


@pytest.mark.parametrize(("heads", "size"), [(1, 16), (3, 128), (20, 72)])
def test_gated_norms(device, dtype, heads, size):
    x, gate = (strided(5, heads * size, device, dtype) for _ in range(2))
    x[0] *= 1e-3  # as small as epsilon
    gate[1] = 60.0
    gate[2] = -60.0
    for weight in (torch.randn(size).to(device, dtype), torch.randn(size).to(device)):
        args = x, gate, weight, 1e-5
        close(ours.gated_rms_norm(*args), naive.gated_rms_norm(*args), dtype)


@pytest.mark.parametrize(("groups", "size"), [(1, 300), (3, 64)])
def test_norms_behind_a_gate(device, dtype, groups, size):
    x, gate = (strided(5, groups * size, device, dtype) for _ in range(2))
    x[0] *= 1e-3  # as small as epsilon
    weight = torch.randn(groups * size).to(device)
    for of_dtype in (weight.to(dtype), weight):
        args = x, gate, of_dtype, 1e-5, size
        close(ours.norm_of_gated(*args), naive.norm_of_gated(*args), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gated_norm_rounds_where_the_twin_rounds(device, dtype):
    """A sum in another order may round a few numbers to the other side, not more."""
    x, gate = (torch.randn(3, 1024).to(device, dtype) for _ in range(2))
    for weight in (torch.randn(128).to(device, dtype), torch.randn(128).to(device)):
        found, expected = (
            kernels.gated_rms_norm(x, gate, weight, 1e-6) for kernels in (ours, naive)
        )
        assert (found != expected).float().mean() < 0.02


@pytest.mark.parametrize("width", [64, 1100])
def test_gates(device, dtype, width):
    x, gate = strided(3, width, device, dtype), 9 * strided(3, width, device, dtype)
    for some in (gate, gate[:, :4]):  # one for each element, and for each run of them
        close(ours.sigmoid_gate(x, some), naive.sigmoid_gate(x, some), dtype)
