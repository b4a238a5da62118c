"""The compiled layers with a state, against the naive twin: ragged, poisoned, on any threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from streamserve_kernels import Kernels
from streamserve_kernels.recurrent import StepStates
from tests.kernels.conftest import TOLERANCE, threads
from tests.kernels.recurrent_cases import (
    DECODES,
    NO_SLOT,
    RAGGED,
    SAVES,
    assert_close,
    convolution,
    delta_rule,
    state_space,
    step_of,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("channels", [1, 300])
@pytest.mark.parametrize(("with_bias", "activation"), [(False, "silu"), (True, None)])
def test_convolution_is_naive(
    naive: Kernels,
    cpu: Kernels,
    channels: int,
    width: int,
    with_bias: bool,
    activation: str | None,
    dtype: torch.dtype,
) -> None:
    step = step_of(RAGGED, SAVES, NO_SLOT, padding=4)
    case = convolution(step, channels, width, dtype, with_bias=with_bias, activation=activation)
    expected, got = case.run(naive), case.run(cpu)
    assert_close(got, expected, case, **TOLERANCE[dtype])
    assert torch.equal(got[1].nan_to_num(9), expected[1].nan_to_num(9)), "states are copies"


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(
    ("heads", "sizes"),
    [((2, 2), (16, 16)), ((2, 4), (64, 128)), ((1, 3), (128, 64)), ((1, 2), (5, 19))],
)
def test_delta_rule_is_naive(
    naive: Kernels,
    cpu: Kernels,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    count: int,
    dtype: torch.dtype,
) -> None:
    case = delta_rule(step_of(RAGGED, SAVES, NO_SLOT, padding=4), heads, sizes, dtype)
    with threads(count):
        assert_close(case.run(cpu), case.run(naive), case, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(
    ("heads", "sizes"),
    [((1, 3), (16, 16)), ((2, 4), (128, 64)), ((1, 2), (5, 19))],
)
def test_state_space_is_naive(
    naive: Kernels,
    cpu: Kernels,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    count: int,
    dtype: torch.dtype,
) -> None:
    case = state_space(step_of(RAGGED, SAVES, NO_SLOT, padding=4), heads, sizes, dtype)
    with threads(count):
        assert_close(case.run(cpu), case.run(naive), case, **TOLERANCE[dtype])


@pytest.mark.parametrize("parts", [(40, 30), (1, 1, 2, 66)])
def test_chunks_are_the_whole(cpu: Kernels, parts: tuple[int, ...]) -> None:
    step = step_of([(0, 70)])
    for case in (
        convolution(step, 40, 4, F32),
        delta_rule(step, (1, 2), (32, 48), F32),
        state_space(step, (1, 2), (48, 40), F32),
    ):
        whole, states = case.run(cpu)
        done, pieces = 0, []
        carried = case.states
        for part in parts:
            rows = slice(done, done + part)
            now = replace(
                step_of([(done, part)]),
                states=StepStates(step.states.slots, step.states.saves[rows]),
            )
            y, carried = replace(case.part(now, rows), states=carried).run(cpu)
            pieces.append(y)
            done += part
        torch.testing.assert_close(torch.cat(pieces), whole, **TOLERANCE[F32])
        kept = now.written()
        torch.testing.assert_close(carried[kept], states[kept], **TOLERANCE[F32])


def test_steps_of_decodes_and_of_nothing(naive: Kernels, cpu: Kernels) -> None:
    for sequences, padding in ((DECODES, 7), ([], 5), ([], 0), ([(3, 0)], 0)):
        step = step_of(sequences, padding=padding)
        for case in (
            convolution(step, 40, 4, F32),
            delta_rule(step, (2, 4), (16, 16), F32),
            state_space(step, (2, 4), (16, 24), F32),
        ):
            assert_close(case.run(cpu), case.run(naive), case, **TOLERANCE[F32])


def test_what_cannot_be_read_by_address_is_refused(cpu: Kernels) -> None:
    step = step_of(RAGGED)
    conv, rule = convolution(step, 40, 4, F32), delta_rule(step, (2, 4), (16, 32), F32)
    space = state_space(step, (2, 4), (16, 32), F32)
    swapped = rule.states.transpose(2, 3).contiguous().transpose(2, 3)
    for wrong, error in (
        (replace(conv, x=conv.x.T.contiguous().T), TypeError),
        (replace(conv, states=conv.states.to(BF16)), TypeError),
        (replace(conv, states=conv.states[:, :2].contiguous()), ValueError),
        (replace(rule, qkv=rule.qkv.T.contiguous().T), TypeError),
        (replace(rule, states=rule.states.double()), TypeError),
        (replace(rule, states=swapped), TypeError),
        (replace(space, xbc=space.xbc.T.contiguous().T), TypeError),
        (replace(space, dt=space.dt.T.contiguous().T), TypeError),
        (replace(space, skip=space.skip.double()), TypeError),
        (replace(space, states=space.states.double()), TypeError),
        (replace(space, step=replace(step, seq_lens=step.seq_lens.long())), TypeError),
        (replace(rule, step=replace(step, seq_lens=step.seq_lens.long())), TypeError),
    ):
        with pytest.raises(error):
            wrong.run(cpu)
