"""Weights that the libraries of their formats packed: see tools/golden_quantised.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FILE = Path(__file__).parent / "golden.safetensors"


def _metadata() -> dict[str, dict[str, Any]]:
    with safe_open(FILE, "pt") as file:
        return {name: json.loads(text) for name, text in sorted(file.metadata().items())}


CONFIGS = {name: values["quantization_config"] for name, values in _metadata().items()}


def golden(case: str) -> tuple[dict[str, Tensor], Tensor]:
    """A case's tensors by their names behind the module's, and the weight as dequantised."""
    with safe_open(FILE, "pt") as file:
        names = [name for name in file.keys() if name.startswith(case + "/")]  # noqa: SIM118
        tensors = {name.removeprefix(case + "/"): file.get_tensor(name) for name in names}
    return tensors, tensors.pop("expected")


class MemoryFiles:
    """A checkpoint that was never written."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self):
        return iter(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def file(self, name: str) -> Path:
        return Path("memory")

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def release(self, name: str) -> None: ...
