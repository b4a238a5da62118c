"""The native layers with a state, against the naive twin: ragged, poisoned, on any threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from streamserve_kernels import Kernels
from streamserve_kernels.recurrent import StepStates
from tests.kernels.conftest import threads
from tests.kernels.recurrent_cases import (
    DECODES,
    NAN,
    NO_SLOT,
    RAGGED,
    SAVES,
    assert_close,
    convolution,
    delta_rule,
    state_space,
    step_of,
)
from tests.kernels.test_layers import normal

BF16 = torch.bfloat16
RTOL = 8e-3  # one rounding


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 40, 579])
@pytest.mark.parametrize(("with_bias", "activation"), [(False, "silu"), (True, None)])
def test_convolution_is_naive(
    naive: Kernels,
    native: Kernels,
    channels: int,
    width: int,
    with_bias: bool,
    activation: str | None,
) -> None:
    step = step_of(RAGGED, SAVES, NO_SLOT, padding=4)
    case = convolution(step, channels, width, BF16, with_bias=with_bias, activation=activation)
    expected, got = case.run(naive), case.run(native)
    assert_close(got, expected, case, rtol=RTOL)
    assert torch.equal(got[1].nan_to_num(9), expected[1].nan_to_num(9)), "states are copies"


@pytest.mark.parametrize("heads", [(2, 2), (3, 6), (1, 3), (17, 17)])
@pytest.mark.parametrize("sizes", [(16, 16), (64, 128), (128, 64), (128, 128)])
def test_delta_rule_is_naive(
    naive: Kernels, native: Kernels, heads: tuple[int, int], sizes: tuple[int, int]
) -> None:
    case = delta_rule(step_of(RAGGED, SAVES, NO_SLOT, padding=4), heads, sizes, BF16)
    assert_close(case.run(native), case.run(naive), case, rtol=RTOL)


@pytest.mark.parametrize("sizes", [(20, 24), (5, 136), (256, 40), (18, 1)])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_delta_rule_of_odd_sizes_is_naive(
    naive: Kernels, native: Kernels, sizes: tuple[int, int], count: int
) -> None:
    """On five threads the columns of a head fall into three pieces."""
    case = delta_rule(step_of(RAGGED[:4], SAVES[:5]), (1, 1), sizes, BF16)
    with threads(count):
        assert_close(case.run(native), case.run(naive), case, rtol=RTOL)


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [((1, 3), (16, 16)), ((2, 4), (128, 64)), ((3, 6), (64, 128)), ((1, 17), (32, 32))],
)
def test_state_space_is_naive(
    naive: Kernels, native: Kernels, heads: tuple[int, int], sizes: tuple[int, int]
) -> None:
    case = state_space(step_of(RAGGED, SAVES, NO_SLOT, padding=4), heads, sizes, BF16)
    assert_close(case.run(native), case.run(naive), case, rtol=RTOL)


@pytest.mark.parametrize("sizes", [(20, 24), (5, 136), (256, 40), (18, 1), (16, 80)])
@pytest.mark.parametrize("count", [1, 5])
def test_state_space_of_odd_sizes_is_naive(
    naive: Kernels, native: Kernels, sizes: tuple[int, int], count: int
) -> None:
    """On five threads the columns of a head fall into three pieces."""
    case = state_space(step_of(RAGGED[:4], SAVES[:5]), (1, 1), sizes, BF16)
    with threads(count):
        assert_close(case.run(native), case.run(naive), case, rtol=RTOL)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_sequence_does_not_depend_on_its_batch_or_the_threads(
    native: Kernels, count: int
) -> None:
    step = step_of(RAGGED, SAVES, padding=3)
    for case in (
        convolution(step, 72, 4, BF16),
        delta_rule(step, (1, 2), (32, 128), BF16),
        state_space(step, (1, 2), (32, 208), BF16),
    ):
        with threads(count):
            y, states = case.run(native)
        for r, rows in enumerate(step.rows()):
            alone = case.part(step.of_sequence(r), rows)
            own, own_states = alone.run(native)
            assert torch.equal(y[rows], own)
            kept = alone.step.written()
            assert torch.equal(states[kept].nan_to_num(9), own_states[kept].nan_to_num(9))


@pytest.mark.parametrize("parts", [(40, 30), (1, 69), (69, 1), (1, 1, 2, 66)])
def test_chunks_are_the_whole(native: Kernels, parts: tuple[int, ...]) -> None:
    """Bit for bit: what lies in a slot is the state itself."""
    step = step_of([(0, 70)])
    for case in (
        convolution(step, 40, 4, BF16),
        delta_rule(step, (1, 2), (32, 48), BF16),
        state_space(step, (1, 2), (48, 80), BF16),
    ):
        whole, states = case.run(native)
        done, pieces = 0, []
        carried = case.states
        for part in parts:
            rows = slice(done, done + part)
            now = replace(
                step_of([(done, part)]),
                states=StepStates(step.states.slots, step.states.saves[rows]),
            )
            y, carried = replace(case.part(now, rows), states=carried).run(native)
            pieces.append(y)
            done += part
        assert torch.equal(torch.cat(pieces), whole)
        assert torch.equal(carried[now.written()], states[now.written()])


def test_steps_of_decodes_and_of_nothing(naive: Kernels, native: Kernels) -> None:
    for sequences, padding in ((DECODES, 7), ([], 5), ([], 0), ([(3, 0)], 0)):
        step = step_of(sequences, padding=padding)
        for case in (
            convolution(step, 40, 4, BF16),
            delta_rule(step, (2, 4), (16, 16), BF16),
            state_space(step, (2, 4), (16, 80), BF16),
        ):
            assert_close(case.run(native), case.run(naive), case, rtol=RTOL)


def test_strong_gates(naive: Kernels, native: Kernels) -> None:
    """Nothing is kept, everything is; a softplus far out on both sides."""
    step = step_of([(3, 5), (0, 4)])
    case = delta_rule(step, (1, 4), (16, 16), BF16)
    case.gates[:, 4:] = torch.tensor([-100.0, -9.0, 25.0, 3e4]).to(BF16)
    case.gates[:, :2] = torch.tensor([-100.0, 100.0]).to(BF16)
    case.decay[:] = torch.tensor([-16.0, -1.0, -0.01, -1e-6])
    assert_close(case.run(native), case.run(naive), case, rtol=RTOL)


def test_strong_rates_of_a_state_space(naive: Kernels, native: Kernels) -> None:
    """Of nearly no time, of much: nothing is written and all is kept, all is, or nothing is."""
    case = state_space(step_of([(3, 5), (0, 4)]), (1, 4), (16, 16), BF16)
    case.dt[:] = torch.tensor([-100.0, -9.0, 25.0, 3e4]).to(BF16)
    case.decay[:] = torch.tensor([-16.0, -1.0, -0.01, -1e-6])
    assert_close(case.run(native), case.run(naive), case, rtol=RTOL)


@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize(("heads", "size"), [(1, 16), (3, 20), (16, 128), (5, 1)])
def test_gates_are_naive(naive: Kernels, native: Kernels, rows: int, heads: int, size: int) -> None:
    width = heads * size
    wide = torch.full((rows, 2 * width + 9), NAN, dtype=BF16)
    x, gate = wide[:, 2 : 2 + width], wide[:, 5 + width : 5 + 2 * width]
    x[:], gate[:] = normal(1, rows, width) * 3, normal(2, rows, width) * 5
    weight = normal(3, size, dtype=BF16)
    for some in (gate, gate[:, :heads]):  # one for each element, and for each head
        got, expected = (k.sigmoid_gate(x, some) for k in (native, naive))
        torch.testing.assert_close(got, expected, atol=4e-6, rtol=RTOL)
    # Rounded before the weight, behind it, and behind the gate.
    got, expected = (k.gated_rms_norm(x, gate, weight, 1e-6) for k in (native, naive))
    torch.testing.assert_close(got, expected, atol=4e-6, rtol=2.4e-2)
    weights = normal(4, width, dtype=BF16)
    for group in {size, width}:
        # Rounded before the weight and behind it.
        got, expected = (k.norm_of_gated(x, gate, weights, 1e-6, group) for k in (native, naive))
        torch.testing.assert_close(got, expected, atol=4e-6, rtol=1.6e-2)


def test_gates_of_extreme_values(naive: Kernels, native: Kernels) -> None:
    gate = torch.tensor([[-1e30, -200.0, -0.0, 0.0, 200.0, 1e30, NAN, 1.0]]).to(BF16)
    x, weight = torch.full_like(gate, 2.0), torch.ones(8, dtype=BF16)
    for call in (
        lambda k: k.sigmoid_gate(x, gate),
        lambda k: k.gated_rms_norm(x, gate, weight, 1e-6),
        lambda k: k.norm_of_gated(x, gate, weight, 1e-6, 4),
    ):
        torch.testing.assert_close(call(native), call(naive), rtol=RTOL, atol=1e-6, equal_nan=True)


def test_what_a_convolution_cannot_take_is_refused(native: Kernels) -> None:
    case = convolution(step_of(RAGGED), 40, 4, BF16, with_bias=True)
    assert case.bias is not None
    wrong = (
        (TypeError, {"x": case.x.float()}),
        (TypeError, {"x": case.x.T.contiguous().T}),
        (ValueError, {"x": case.x[:, :39]}),
        (TypeError, {"weight": case.weight.float()}),
        (ValueError, {"weight": case.weight[:, :3]}),
        (ValueError, {"weight": case.weight.repeat(1, 5)}),
        (TypeError, {"bias": case.bias.float()}),
        (ValueError, {"bias": case.bias[:39]}),
        (TypeError, {"states": case.states.float()}),
        (TypeError, {"states": case.states.transpose(1, 2).contiguous().transpose(1, 2)}),
    )
    for error, arguments in wrong:
        with pytest.raises(error):
            replace(case, **arguments).run(native)


def test_what_a_delta_rule_cannot_take_is_refused(native: Kernels) -> None:
    case = delta_rule(step_of(RAGGED), (2, 4), (16, 32), BF16)
    wide = delta_rule(step_of([(0, 1)]), (1, 1), (257, 16), BF16)
    wrong = (
        (TypeError, {"qkv": case.qkv.float()}),
        (ValueError, {"qkv": case.qkv[:, 1:]}),
        (ValueError, {"gates": case.gates[:, 1:]}),
        (ValueError, {"gates": case.gates[1:]}),
        (TypeError, {"gates": case.gates.float()}),
        (ValueError, {"decay": case.decay.double()}),
        (ValueError, {"decay": case.decay[:1]}),
        (TypeError, {"time_bias": case.time_bias.repeat_interleave(2)[::2]}),
        (TypeError, {"states": case.states.to(BF16)}),
        (TypeError, {"states": case.states.transpose(2, 3).contiguous().transpose(2, 3)}),
        (ValueError, {"num_key_heads": 3}),
    )
    for error, arguments in wrong:
        with pytest.raises(error):
            replace(case, **arguments).run(native)
    with pytest.raises(ValueError, match="at most 256 elements, got 257"):
        wide.run(native)


def test_what_a_state_space_cannot_take_is_refused(native: Kernels) -> None:
    case = state_space(step_of(RAGGED), (2, 4), (16, 32), BF16)
    wide = state_space(step_of([(0, 1)]), (1, 1), (257, 16), BF16)
    wrong = (
        (TypeError, {"xbc": case.xbc.float()}),
        (ValueError, {"xbc": case.xbc[:, 1:]}),
        (ValueError, {"dt": case.dt[:, 1:]}),
        (ValueError, {"dt": case.dt[1:]}),
        (TypeError, {"dt": case.dt.float()}),
        (ValueError, {"decay": case.decay.double()}),
        (ValueError, {"skip": case.skip[:1]}),
        (ValueError, {"skip": case.skip.to(BF16)}),
        (TypeError, {"skip": case.skip.repeat_interleave(2)[::2]}),
        (TypeError, {"states": case.states.to(BF16)}),
        (ValueError, {"num_groups": 3}),
    )
    for error, arguments in wrong:
        with pytest.raises(error):
            replace(case, **arguments).run(native)
    with pytest.raises(ValueError, match="at most 256 elements, got 257"):
        wide.run(native)


def test_gates_of_other_rows_are_refused(native: Kernels) -> None:
    x, weight = normal(1, 4, 32, dtype=BF16), normal(2, 16, dtype=BF16)
    for gate in (x[:, :12], x[:2]):
        with pytest.raises(ValueError, match="cannot be gated"):
            native.sigmoid_gate(x, gate)
    for gate in (x[:, :16], x[:2]):
        with pytest.raises(ValueError, match="cannot be gated"):
            native.gated_rms_norm(x, gate, weight, 1e-6)
        with pytest.raises(ValueError, match="cannot be gated"):
            native.norm_of_gated(x, gate, weight.repeat(2), 1e-6, 32)
    for group, wide in ((15, weight.repeat(2)), (16, weight)):
        with pytest.raises(ValueError, match=f"groups of {group} in rows of 32"):
            native.norm_of_gated(x, x, wide, 1e-6, group)
    with pytest.raises(TypeError, match=r"got torch\.float32"):
        native.norm_of_gated(x, x, weight.repeat(2).float(), 1e-6, 32)
    with pytest.raises(ValueError, match="heads of 15"):
        native.gated_rms_norm(x, x, weight[:15], 1e-6)
    with pytest.raises(TypeError, match=r"got torch\.float32"):
        native.gated_rms_norm(x, x, weight.float(), 1e-6)


def test_a_step_that_points_nowhere_does_not_run(native: Kernels) -> None:
    step = step_of(RAGGED)
    many, rows = step.num_slots, step.num_rows
    for case in (
        convolution(step, 40, 4, BF16),
        delta_rule(step, (2, 4), (16, 16), BF16),
        state_space(step, (2, 4), (16, 16), BF16),
    ):
        for change in (
            {"states": step.states._replace(slots=torch.full_like(step.states.slots, many))},
            {"states": step.states._replace(slots=torch.full_like(step.states.slots, -2))},
            {"states": step.states._replace(saves=torch.full_like(step.states.saves, many))},
            {"query_start_loc": step.query_start_loc + 1},
            {"query_start_loc": step.query_start_loc * 2},
            {"query_start_loc": step.query_start_loc.flip(0) - rows},
            {"seq_lens": torch.zeros_like(step.seq_lens)},
        ):
            with pytest.raises(IndexError, match="not there"):
                replace(case, step=replace(step, **change)).run(native)
        with pytest.raises(TypeError, match="int32"):
            replace(case, step=replace(step, seq_lens=step.seq_lens.long())).run(native)
        short = step.states._replace(saves=step.states.saves[1:])
        with pytest.raises(ValueError, match=f"{rows} indices are due"):
            replace(case, step=replace(step, states=short)).run(native)
