"""Draws from rows of logits on a CPU, timed: `python kernels/bench/cpu.py --only draws`.

Beside ours stands the specification, which sorts the vocabulary. The floor is the bytes of the
logits at the bandwidth measured first. *Peaked* rows are as a trained model's, a few tokens of
which have nearly all the weight; *flat* ones as random weights make them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from streamserve_kernels import load_row_draws, naive_sampling
from streamserve_kernels.sampling import SamplingTensors

Timed = Callable[[list[Callable[[], object]], float], list[float]]

# temperature, min-p, top-k, top-p
WISHES = {
    "greedy": (0.0, 0.0, 0, 1.0),
    "temperature": (0.8, 0.0, 0, 1.0),
    "min-p": (0.8, 0.05, 0, 1.0),
    "top-k 20, top-p 0.8": (0.7, 0.0, 20, 0.8),
    "top-p 0.9": (0.8, 0.0, 0, 0.9),
}


def rows_of(shape: str, count: int, vocab_size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((count, vocab_size)).astype(np.float32)
    if shape == "peaked":
        logits *= 2
        for row in logits:
            row[rng.integers(0, vocab_size, 30)] += rng.uniform(5, 15, 30).astype(np.float32)
    return logits


def bench_draws(vocab_size: int, rows: list[int], bandwidth: float, timed: Timed) -> None:
    draws = load_row_draws(vocab_size)
    if draws is None:
        print("\ndraws: the native kernels cannot run here")
        return
    title = f"draws of {vocab_size}"
    print(f"\n{title:<24}{'':>8}{'rows':>6}{'µs':>10}{'floor':>9}{'share':>7}{'vs a sort':>11}")
    for shape in ("peaked", "flat"):
        for count in rows:
            logits = rows_of(shape, count, vocab_size)
            uniforms = np.random.default_rng(1).random(count)
            for name, (temperature, min_p, top_k, top_p) in WISHES.items():
                asked = {
                    "temperature": np.full(count, temperature, dtype=np.float32),
                    "min_p": np.full(count, min_p, dtype=np.float32),
                    "top_k": np.full(count, top_k),
                    "top_p": np.full(count, top_p),
                    "uniforms": uniforms,
                }
                tensors = SamplingTensors(
                    torch.from_numpy(asked["temperature"]),
                    torch.from_numpy(asked["top_k"]),
                    torch.from_numpy(asked["top_p"]),
                    torch.from_numpy(asked["min_p"]),
                    torch.from_numpy(uniforms),
                )
                on_torch = torch.from_numpy(logits)
                found = draws.draw(logits, **asked)
                expected = naive_sampling.sample(on_torch, tensors).numpy()
                # Where the CDF has a step the last bits decide.
                assert (found != expected).sum() <= max(1, count // 16), name
                ours, theirs = timed(
                    [
                        lambda x=logits, a=asked: draws.draw(x, **a),
                        lambda x=on_torch, t=tensors: naive_sampling.sample(x, t),
                    ],
                    0.3,
                )
                floor = logits.nbytes / bandwidth
                print(
                    f"{name:<24}{shape:>8}{count:>6}{1e6 * ours:>10.1f}{1e6 * floor:>9.1f}"
                    f"{floor / ours:>7.0%}{theirs / ours:>10.0f}x"
                )
