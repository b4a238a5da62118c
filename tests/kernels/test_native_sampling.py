"""Draws from rows of logits against `naive_sampling`, which sorts, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamserve_kernels import naive_sampling
from streamserve_kernels.native import sampling
from streamserve_kernels.native.library import why_not
from streamserve_kernels.pool import pool
from streamserve_kernels.sampling import SamplingTensors

pytestmark = pytest.mark.usefixtures("each_build")

SHAPES = ["flat", "peaked", "tied", "few"]


@pytest.fixture(scope="module")
def draws_of(each_build):
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    return sampling.RowDraws


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def rows_of(shape: str, count: int, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    logits = rng.standard_normal((count, vocab_size)).astype(np.float32)
    if shape == "peaked":
        logits *= 6
    elif shape == "tied":
        logits = np.round(2 * logits)
    elif shape == "few":
        logits[rng.random(logits.shape) < 0.98] = -np.inf
        logits[rng.random(logits.shape) < 0.3] = np.nan
        logits[:, vocab_size // 2] = 0.0
    return logits


def amid(other: float, logits: np.ndarray) -> np.ndarray:
    """The same rows at a larger distance, other numbers between them."""
    wide = np.full((len(logits) + 2, logits.shape[1] + 37), other, dtype=np.float32)
    rows = wide[1:-1, 5 : 5 + logits.shape[1]]
    rows[:] = logits
    return rows


def wishes(count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "temperature": rng.choice([0.0, 0.2, 0.9, 1.0, 3.0], count).astype(np.float32),
        "min_p": rng.choice([0.0, 0.0, 1e-4, 0.1, 1.0], count).astype(np.float32),
        "top_k": rng.choice([0, 0, 1, 5, 40, 700, 2**40], count),
        "top_p": rng.choice([1.0, 1.0, 0.01, 0.5, 0.9, 0.999], count),
        "uniforms": rng.choice([0.0, 1 - 2.0**-53, *rng.random(20)], count),
    }


def masks_of(count: int, vocab_size: int, rng: np.random.Generator) -> dict[int, np.ndarray]:
    masks = {row: rng.random(vocab_size) < 0.3 for row in range(0, count, 3)}
    for mask in masks.values():
        mask[vocab_size // 2] = True
    return masks


@pytest.mark.parametrize("vocab_size", [1, 15, 17, 256, 257, 1003, 20_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_draws_are_those_of_a_sort(draws_of, threads, shape, vocab_size):
    rng = np.random.default_rng(vocab_size)
    count = 60
    logits = rows_of(shape, count, vocab_size, rng)
    asked = wishes(count, rng)
    masks = masks_of(count, vocab_size, rng)
    packed = {row: np.packbits(m, bitorder="little").tobytes() for row, m in masks.items()}
    draws = draws_of(vocab_size)
    rows = amid(np.nan, logits)
    found = draws.draw(rows, **asked, masks=packed)
    assert found.tolist() == [
        int(draws.draw(rows[i : i + 1], **one_of(asked, i), masks=first_of(packed, i))[0])
        for i in range(count)
    ]
    logits[np.isnan(logits)] = -np.inf
    for row, mask in masks.items():
        logits[row, ~mask] = -np.inf
    values = torch.from_numpy(logits)
    tensors = SamplingTensors(
        *(torch.from_numpy(np.minimum(asked[name], 2**30).astype(dtype))
          for name, dtype in (("temperature", np.float32), ("top_k", np.int32),
                              ("top_p", np.float64), ("min_p", np.float32),
                              ("uniforms", np.float64)))
    )  # fmt: skip
    weights = naive_sampling.truncated_weights(values, tensors).double().numpy()
    for row, token in enumerate(found.tolist()):
        if asked["temperature"][row] == 0:
            assert token == logits[row].argmax()
            continue
        # Where the CDF has a step the last bits decide.
        cumulative = weights[row].cumsum() / weights[row].sum()
        low, high = (
            np.searchsorted(cumulative, asked["uniforms"][row] + by, side="right")
            for by in (-1e-6, 1e-6)
        )
        assert low <= token <= max(high, low)
        assert weights[row, token] > 0


def one_of(asked: dict[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    return {name: values[row : row + 1] for name, values in asked.items()}


def first_of(masks: dict[int, bytes], row: int) -> dict[int, bytes]:
    return {0: masks[row]} if row in masks else {}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_top_k_and_top_p_keep_is_drawn_and_nothing_else(draws_of, shape):
    """Every kept token of a small row comes up when the uniform walks through [0, 1)."""
    rng = np.random.default_rng(5)
    vocab_size, count = 300, 2000
    logits = rows_of(shape, 1, vocab_size, rng)
    asked = {
        "temperature": np.float32(1.0), "min_p": np.float32(0.0), "top_k": 12, "top_p": 0.8
    }  # fmt: skip
    batch = {name: np.full(count, value) for name, value in asked.items()}
    draws = (np.arange(count) + 0.5) / count
    rows = np.repeat(logits, count, axis=0)
    found = draws_of(vocab_size).draw(rows, **batch, uniforms=draws)
    tensors = SamplingTensors(
        torch.tensor([1.0]), torch.tensor([12]), torch.tensor([0.8]).double(),
        torch.tensor([0.0]), torch.tensor([0.0]).double(),
    )  # fmt: skip
    logits[np.isnan(logits)] = -np.inf
    weights = naive_sampling.truncated_weights(torch.from_numpy(logits), tensors)[0].double()
    expected = weights / weights.sum()
    counts = np.bincount(found, minlength=vocab_size)
    assert np.abs(counts - count * expected.numpy()).max() <= 1
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))


@pytest.mark.parametrize("vocab_size", [1, 16, 300, 9000, 20_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_logits_and_the_sum(draws_of, threads, shape, vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = rows_of(shape, 12, vocab_size, rng)
    logits[3] *= 60  # most weights are 0
    draws = draws_of(vocab_size)
    counts = np.minimum(rng.choice([0, 1, 5, 20, draws.many], 12), draws.many)
    counts[7] = -1
    ids, sums = draws.top(amid(3e38, logits), counts)
    logits[np.isnan(logits)] = -np.inf
    assert ids.shape[1] == min(counts.max(), vocab_size)
    for row, count in enumerate(counts.tolist()):
        if count < 0:
            assert np.isnan(sums[row])
            continue
        order = np.argsort(-logits[row], kind="stable")
        assert ids[row, :count].tolist() == order[:count].tolist()
        expected = torch.from_numpy(logits[row]).double().logsumexp(0).item()
        assert sums[row] == pytest.approx(expected, abs=2e-6 * max(1.0, abs(expected)))


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_rows_without_a_finite_maximum_are_left_to_the_caller(draws_of, bad):
    logits = np.random.default_rng(0).standard_normal((3, 700)).astype(np.float32)
    logits[1, :] = bad
    asked = one_of(wishes(1, np.random.default_rng(0)), 0)
    found = draws_of(700).draw(logits, **{k: np.repeat(v, 3) for k, v in asked.items()})
    assert (found >= 0).tolist() == [True, False, True]
    _, sums = draws_of(700).top(logits, np.array([2, 2, 2]))
    assert np.isnan(sums).tolist() == [False, True, False]


def test_a_mask_that_allows_nothing_is_left_to_the_caller(draws_of):
    logits = np.zeros((2, 40), dtype=np.float32)
    asked = {name: np.repeat(v[:1], 2) for name, v in wishes(1, np.random.default_rng(0)).items()}
    draws = draws_of(40)
    found = draws.draw(logits, **asked, masks={0: b"", 1: b"\xff" * 9})
    assert found[0] == -1
    assert 0 <= found[1] < 40


@pytest.mark.parametrize("vocab_size", [1, 16, 257, 4097])
def test_scratch_is_as_large_as_it_is_said_to_be(draws_of, vocab_size):
    """All tokens tie: every part of the scratch is filled to its end."""
    draws = draws_of(vocab_size)
    margin = 4096
    guarded = np.full((1, sampling.work_bytes(vocab_size) + 2 * margin), 0x5A, dtype=np.uint8)
    draws._scratch = guarded[:, margin:-margin]
    draws._row_bytes = sampling.work_bytes(vocab_size)
    logits = np.zeros((1, vocab_size), dtype=np.float32)
    for top_k in (0, 1, vocab_size):
        asked = {
            "temperature": np.float32(1.0), "min_p": np.float32(0.0), "top_k": top_k,
            "top_p": 0.9, "uniforms": 0.5,
        }  # fmt: skip
        draws.draw(logits, **{name: np.full(1, value) for name, value in asked.items()})
    draws.top(logits, np.array([min(draws.many, vocab_size)]))
    assert (guarded[0, :margin] == 0x5A).all()
    assert (guarded[0, -margin:] == 0x5A).all()


def test_rows_that_are_not_adjacent_float32_are_refused(draws_of):
    asked = wishes(2, np.random.default_rng(0))
    draws = draws_of(8)
    for logits in (np.zeros((2, 8)), np.zeros((8, 2), dtype=np.float32).T):
        with pytest.raises(TypeError, match="adjacent float32"):
            draws.draw(logits, **asked)


def test_no_more_threads_than_rows_have_scratch(draws_of, threads):
    draws = draws_of(100)
    logits = np.zeros((2, 100), dtype=np.float32)
    draws.draw(logits, **wishes(2, np.random.default_rng(0)))
    assert len(draws._scratch) == min(threads, pool().threads(), 2)
