from __future__ import annotations

import numpy as np
import pytest

from streamserve.runner.philox import philox4x32, uniforms


def words(text: str) -> np.ndarray:
    return np.array([[int(word, 16)] for word in text.split()], dtype=np.uint64)


# Random123's kat_vectors, rows "philox4x32 10".
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert np.array_equal(philox4x32(words(counter), words(key)), words(expected))


def plain_uniform(seed: int, choice_index: int, position: int) -> float:
    counter = [position, choice_index, 0, 0]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return ((counter[0] >> 5) * 2**26 + (counter[1] >> 6)) / 2**53


def test_uniforms_are_those_of_plain_integers():
    rng = np.random.default_rng(0)
    seeds = rng.integers(-(2**63), 2**63, size=50, dtype=np.int64)
    seeds[:3] = 0, -1, 2**63 - 1
    choices = rng.integers(0, 20, size=50)
    positions = rng.integers(0, 2**20, size=50)
    found = uniforms(seeds, choices, positions)
    expected = [
        plain_uniform(*row)
        for row in zip(seeds.tolist(), choices.tolist(), positions.tolist(), strict=True)
    ]
    assert found.tolist() == expected


def test_each_draw_stands_alone():
    seeds = np.array([5, 6, 5], dtype=np.int64)
    choices = np.array([0, 0, 1], dtype=np.int64)
    positions = np.array([9, 9, 9], dtype=np.int64)
    together = uniforms(seeds, choices, positions)
    alone = [
        uniforms(seeds[i : i + 1], choices[i : i + 1], positions[i : i + 1])[0] for i in range(3)
    ]
    assert together.tolist() == alone
    assert len(set(alone)) == 3


def test_draws_fill_the_unit_interval_evenly():
    count = 20_000
    draws = uniforms(
        np.full(count, 42, dtype=np.int64),
        np.zeros(count, dtype=np.int64),
        np.arange(count, dtype=np.int64),
    )
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    # Kolmogorov-Smirnov at a fixed seed: 1.95/sqrt(n) is the 0.1% point.
    steps = np.arange(1, count + 1) / count
    assert np.abs(np.sort(draws) - steps).max() < 1.95 / np.sqrt(count)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02
