"""Layers with a state in a recorded step, beside the functions on tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from streamserve_kernels import Kernels, NotRecordableError
from streamserve_kernels.recurrent import StepStates
from tests.kernels.conftest import threads
from tests.kernels.recurrent_cases import Step, states_of, step_of
from tests.kernels.test_layers import normal

BF16 = torch.bfloat16
HIDDEN, KEY_HEADS, HEADS, SIZE, VALUE_SIZE, WIDTH = 48, 2, 4, 16, 32, 4
CHANNELS, VALUES = 2 * KEY_HEADS * SIZE + HEADS * VALUE_SIZE, HEADS * VALUE_SIZE
# No more rows than are recorded where there are matrix units.
STEPS = [[(0, 3), (2, 1), (5, 2)], [(9, 1)] * 8, [(0, 8)], [(4, 1), (0, 1)]]


class Layer:
    """A gated delta net whose output has a gate more, in place of attention's."""

    def __init__(self, kernels: Kernels, seed: int) -> None:
        def weight(outputs: int, inputs: int) -> Any:
            scaled = normal(seed, outputs, inputs, dtype=BF16) / inputs**0.5
            return kernels.prepare_linear(scaled)

        self.mixed = weight(CHANNELS + 2 * VALUES, HIDDEN)
        self.gates = weight(2 * HEADS, HIDDEN)
        self.output = weight(HIDDEN, VALUES)
        self.conv = normal(seed + 1, CHANNELS, WIDTH, dtype=BF16)
        self.bias = normal(seed + 2, CHANNELS, dtype=BF16)
        self.decay, self.time_bias = -normal(seed + 3, HEADS).abs(), normal(seed + 4, HEADS)
        self.norm = normal(seed + 5, VALUE_SIZE, dtype=BF16)

    def forward(self, kernels: Any, x: Any, batch: Any, states: tuple[Tensor, Tensor]) -> Any:
        sizes = (CHANNELS, VALUES, VALUES)
        mixed, inner, outer = kernels.linear(x, self.mixed).split_with_sizes(sizes, 1)
        where = states[0], batch.states, batch.query_start_loc, batch.seq_lens
        y = kernels.causal_conv(mixed, self.conv, self.bias, *where, activation="silu")
        gates = kernels.linear(x, self.gates)
        where = states[1], *where[1:]
        y = kernels.gated_delta_rule(
            y, gates, self.decay, self.time_bias, *where, num_key_heads=KEY_HEADS
        )
        y = kernels.gated_rms_norm(y, inner, self.norm, 1e-6)
        y = kernels.sigmoid_gate(y.view(y.shape[0], VALUES), outer)
        return kernels.linear(y, self.output)


class SpaceLayer:
    """A state space whose time steps, inputs and gate are one product, with a norm behind it."""

    def __init__(self, kernels: Kernels, seed: int) -> None:
        def weight(outputs: int, inputs: int) -> Any:
            scaled = normal(seed, outputs, inputs, dtype=BF16) / inputs**0.5
            return kernels.prepare_linear(scaled)

        self.mixed = weight(VALUES + CHANNELS + HEADS, HIDDEN)
        self.output = weight(HIDDEN, VALUES)
        self.conv = normal(seed + 1, CHANNELS, WIDTH, dtype=BF16)
        self.bias = normal(seed + 2, CHANNELS, dtype=BF16)
        self.decay, self.time_bias = -normal(seed + 3, HEADS).abs(), normal(seed + 4, HEADS)
        self.skip = normal(seed + 5, HEADS)
        self.norm = normal(seed + 6, VALUES, dtype=BF16)

    def forward(self, kernels: Any, x: Any, batch: Any, states: tuple[Tensor, Tensor]) -> Any:
        mixed = kernels.linear(x, self.mixed)
        gate, xbc, dt = mixed.split_with_sizes((VALUES, CHANNELS, HEADS), 1)
        where = batch.states, batch.query_start_loc, batch.seq_lens
        xbc = kernels.causal_conv(xbc, self.conv, self.bias, states[0], *where, activation="silu")
        y = kernels.state_space_scan(
            xbc,
            dt,
            self.decay,
            self.time_bias,
            self.skip,
            states[1],
            *where,
            num_groups=KEY_HEADS,
        )
        y = kernels.norm_of_gated(y, gate, self.norm, 1e-6, VALUES // KEY_HEADS)
        return kernels.linear(y, self.output)


class Model:
    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.table = normal(1, 20, HIDDEN, dtype=BF16)
        kinds = Layer, SpaceLayer, Layer, SpaceLayer
        self.layers = [kind(kernels, 10 + 20 * i) for i, kind in enumerate(kinds)]
        self.head = kernels.prepare_linear(normal(2, 20, HIDDEN, dtype=BF16))

    def forward(self, kernels: Any, batch: Any, states: list[tuple[Tensor, Tensor]]) -> Any:
        x = kernels.embedding(batch.input_ids, self.table)
        for layer, kept in zip(self.layers, states, strict=True):
            x = x + layer.forward(kernels, x, batch, kept)
        return x.index_select(0, batch.logits_indices)


def batch_of(step: Step) -> SimpleNamespace:
    count = step.num_rows
    return SimpleNamespace(
        input_ids=torch.arange(count) % 20,
        positions=torch.zeros(count, dtype=torch.int64),
        slot_mapping=torch.full((count,), -1),
        query_start_loc=step.query_start_loc,
        seq_lens=step.seq_lens,
        block_table=torch.zeros(len(step.seq_lens), 1, dtype=torch.int32),
        logits_indices=torch.arange(count),
        prefix_groups=None,
        adapters=None,
        states=step.states,
    )


def states_like(step: Step) -> list[tuple[Tensor, Tensor]]:
    return [
        (
            states_of(step, WIDTH - 1, CHANNELS, dtype=BF16),
            states_of(step, HEADS, SIZE, VALUE_SIZE, dtype=torch.float32),
        )
        for _ in range(4)
    ]


@pytest.mark.parametrize("count", [1, 3])
def test_a_recorded_step_is_the_functions_one_by_one(native: Kernels, count: int) -> None:
    """Bit for bit, whatever slots and lengths each of the steps names."""
    model = Model(native)
    steps = [step_of(sequences, saves=((0, 0),)) for sequences in STEPS]
    most = max(steps, key=lambda step: step.num_slots)
    recorded_states, states = states_like(most), states_like(most)
    recorder = native.recorder(8, 8)
    assert recorder is not None
    x = model.forward(recorder, recorder.batch, recorded_states)
    recorded = recorder.finish(x, model.head, 1.0, None)
    with threads(count):
        for step in steps:
            for both in (recorded_states, states):
                for mine, fresh in zip(both, states_like(step), strict=True):
                    for kept, drawn in zip(mine, fresh, strict=True):
                        kept.fill_(float("nan"))[: step.num_slots] = drawn
            batch = batch_of(step)
            expected = model.forward(native, batch, states)
            recorded.logits(batch)
            assert torch.equal(recorded.hidden_states(step.num_rows), expected)
            assert not expected.isnan().any()
            for mine, theirs in zip(recorded_states, states, strict=True):
                for kept, drawn in zip(mine, theirs, strict=True):
                    assert torch.equal(kept.nan_to_num(9), drawn.nan_to_num(9))


def test_a_recorded_step_that_names_no_slots_does_not_run(native: Kernels) -> None:
    model, step = Model(native), step_of([(0, 2), (4, 1)])
    states = states_like(step)
    recorder = native.recorder(8, 8)
    assert recorder is not None
    x = model.forward(recorder, recorder.batch, states)
    recorded = recorder.finish(x, model.head, 1.0, None)
    beyond = StepStates(step.states.slots + step.num_slots, step.states.saves)
    for wrong, error in (
        (None, IndexError),
        (beyond, IndexError),
        (StepStates(step.states.slots.long(), step.states.saves), TypeError),
    ):
        batch = batch_of(step)
        batch.states = wrong
        with pytest.raises(error):
            recorded.greedy(batch)


def test_states_of_rows_that_need_logits_are_not_recorded(native: Kernels) -> None:
    model, step = Model(native), step_of([(0, 2)])
    recorder = native.recorder(4, 4)
    assert recorder is not None
    batch = recorder.batch
    x = recorder.gather(recorder.embedding(batch.input_ids, model.table))
    for layer in model.layers[:2]:
        with pytest.raises(NotRecordableError, match="other rows than the step's tokens"):
            layer.forward(recorder, x, batch, states_like(step)[0])
