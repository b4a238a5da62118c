"""Rows of sampling from logits [L, V] float32, without a full sort."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from device_bench.row import Bench, Case, Row, check_equal
from device_bench.timing import Call

_COUNT = 64


def rows(quick: bool) -> list[Row]:
    return [Row("sampling", f"greedy, {_COUNT} x vocabulary", _greedy)]


def _module() -> Any:
    """Sampling is no part of the contract: its backend is Triton's alone."""
    return importlib.import_module("streamserve_kernels.triton.sampling")


def _logits(bench: Bench) -> Tensor:
    return 4 * torch.randn(bench.sizes.requests(_COUNT), bench.sizes.vocab, device=bench.device)


def _rotated(bench: Bench, function: Callable[[Tensor], object]) -> Sequence[Call]:
    def make() -> Call:
        logits = _logits(bench)
        return lambda: function(logits)

    return bench.rotated(make, _logits(bench).nbytes)


def _greedy(bench: Bench) -> Case:
    greedy = _module().greedy

    def check() -> None:
        logits = _logits(bench)
        check_equal(greedy(logits), logits.argmax(dim=-1))

    return Case(
        calls=_rotated(bench, greedy),
        check=check,
        num_bytes=_logits(bench).nbytes,
        peers={"argmax": lambda: _rotated(bench, lambda logits: logits.argmax(dim=-1))},
    )
