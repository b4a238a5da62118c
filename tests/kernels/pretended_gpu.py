"""A GPU that is not there: what is asked of "cuda" happens on the CPU, in Triton's interpreter.

`STREAMSERVE_PRETEND_GPU=1 pytest tests/kernels -m gpu` runs the bodies of the GPU's tests so, in
its dtypes: what is wrong in a test costs no time of a card. `capture` is also for tests that run
without one: a graph there is a list of operations and launches.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

IS_PRETENDED = os.environ.get("STREAMSERVE_PRETEND_GPU") == "1"
HAS_GPU = torch.cuda.is_available()


class OnCpu(TorchFunctionMode):
    """Every "cuda" in an argument is the CPU, and what is moved there is a copy."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.cuda:
            return args[0].clone()
        moved = [_on_cpu(value) for value in args]
        options = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        result = function(*moved, **options)
        is_moved = moved != list(args) if function is Tensor.to else False
        return result.clone() if is_moved and result is args[0] else result


def _on_cpu(value: object) -> object:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


class RecordedGraph(TorchDispatchMode):
    """What a CUDA graph is: launches with the numbers and the tensors that they had."""

    # They wait for the device, or copy from memory that a graph may not keep.
    _REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique")

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in function.name() for name in self._REFUSED):
            raise RuntimeError(f"{function.name()} cannot be captured")
        result = function(*args, **(kwargs or {}))
        self._calls.append(partial(_again, partial(function, *args, **(kwargs or {})), result))
        return result

    def record(self, function: Callable[[], Any]) -> Any:
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def recorded(executor: Any, *args: Any, **kwargs: Any) -> None:
            self._calls.append(partial(launch, executor, *args, **kwargs))
            with _disable_current_modes():
                launch(executor, *args, **kwargs)

        with patch.object(GridExecutor, "__call__", recorded), self:
            return function()

    def replay(self) -> None:
        for call in self._calls:
            call()


def _again(call: Callable[[], object], result: object) -> None:
    """The same operation, its result where it was."""
    for old, new in zip(tree_leaves(result), tree_leaves(call()), strict=True):
        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


def capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """(what replays a captured call, its result), on a GPU or as if there were one."""
    if not HAS_GPU:
        recorded = RecordedGraph()
        result = recorded.record(function)
        return recorded.replay, result
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result
