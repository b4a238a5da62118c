"""What is known of a model before it is loaded, and what an engine needs of it afterwards."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

import streamserve_kernels
from streamserve.config import AdapterConfig, SchedulerConfig
from streamserve.core.plan import ModelRunner
from streamserve.core.step_time import StepProfile
from streamserve.models import (
    AdapterTables,
    Decoder,
    DraftHead,
    LanguageModel,
    ModelConfig,
    load_model,
)
from streamserve.models.model_shape import ModelShape
from streamserve.runner.memory import MemoryPlan, format_bytes
from streamserve.runner.tensor_parallel.team import Team
from streamserve_kernels import Kernels, Quantization

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class HeadSetup:
    """What is known of a draft head before it is loaded, for a target that is tapped so."""

    spec: ModelShape
    weight_bytes: int
    load: Callable[[Decoder], DraftHead]
    taps: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSetup:
    """The flags with the device's defaults, and all that follows from them and the config.

    ``quantization`` is of plain weights, while they are loaded. With a ``team`` the config is that
    of this rank's share. ``draft`` is the setup of a model that drafts for this one, ``head`` that
    of a head of its hidden states.
    """

    args: Namespace
    path: Path
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    scheduler: SchedulerConfig
    quantization: Quantization | None
    adapters: AdapterConfig | None
    say: Say
    warn: Say
    team: Team | None = None
    draft: ModelSetup | None = None
    head: HeadSetup | None = None

    def choose_kernels(self) -> Kernels:
        """The backend; says its name."""
        kernels = streamserve_kernels.load(
            self.device,
            dtype=self.dtype,
            head_sizes=self.config.spec.head_sizes(),
            block_size=self.args.block_size,
        )
        self.say(f"  kernels       {kernels.name}")
        return kernels

    def load(self, kernels: Kernels) -> LanguageModel:
        """The model on its device; minutes for a big one. Raises ``ModelLoadError``."""
        stored = self.config.stored_quantization
        method = self.quantization if stored is None else stored.name
        if method is not None and (reason := kernels.slow_quantisation()) is not None:
            self.warn(f"{method} weights will be slow: {reason}")
        return load_model(
            self.path,
            dtype=self.dtype,
            device=self.device,
            kernels=kernels,
            config=self.config,
            load_format=self.args.load_format,
            max_model_len=self.scheduler.max_model_len,
            progress=Progress(self.say),
            seed=self.args.seed or 0,
            quantization=self.quantization,
            adapters=self.adapters,
            ranks=None if self.team is None else self.team.ranks,
        )

    def say_plan(self, memory: MemoryPlan) -> None:
        """Prints where the memory goes."""
        for line in memory.describe().splitlines():
            self.say(f"  {line}")


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A warm runner, what its steps took, and the memory that it works in.

    ``adapters`` are the places for them, where adapters are served.
    """

    runner: ModelRunner
    profile: StepProfile
    memory: MemoryPlan
    num_host_blocks: int = 0
    max_transfers_per_step: int = 1
    adapters: AdapterTables | None = None
    finish_warm_up: Callable[[], None] = lambda: None
    """Does at once what a server leaves for when it is idle."""


class ModelBuilder(Protocol):
    """One device's way from a setup to a runner. Making one starts what may run meanwhile."""

    def build(self) -> BuiltModel:
        """Loads the model and warms the runner. Main thread. Raises ``StreamServeError``."""
        ...


class Progress:
    """Says how far the weights are, at most once a second, and only if it takes that long."""

    def __init__(self, say: Say, interval_s: float = 1.0) -> None:
        self._say = say
        self._interval_s = interval_s
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes are loaded."""
        now = time.monotonic()
        if now - self._last >= self._interval_s and total:
            self._last = now
            self._say(f"loading weights: {100 * done // total}% of {format_bytes(total)}")
