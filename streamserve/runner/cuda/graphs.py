"""Runs a padded step: launch by launch, or as a CUDA graph that was captured once.

What belongs to a step of one shape, and is the same for all of them::

    resolve pending ids -> forward -> logits -> arg-max -> what each row drew last

It reads the arena's inputs and leaves the logits in a place of their own; the next step overwrites
them.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from streamserve.models.batch import ForwardBatch, KVCache
from streamserve.runner.cuda.arena import StepArena, StepInputs
from streamserve.runner.cuda.step_key import StepKey
from streamserve.runner.prompt_logprobs import PromptModel
from streamserve_kernels import Kernels
from streamserve_kernels.sampling import SamplingKernels

logger = logging.getLogger(__name__)


class DeviceKernels(Kernels, Protocol):
    """What a backend for devices offers beyond the contract."""

    def resolve_tokens(self, input_ids: Tensor, last_tokens: Tensor) -> None:
        """See `streamserve_kernels.naive`."""


class DeviceModel(PromptModel, Protocol):
    """What is run: a ``streamserve.models.Decoder``."""

    @property
    def device(self) -> torch.device:
        """Where batches and caches live."""

    @property
    def kernels(self) -> Kernels:
        """The backend."""

    @property
    def logits_dtype(self) -> torch.dtype:
        """In which logits are kept."""

    def forward(self, batch: ForwardBatch, kv_caches: KVCache, logits: Tensor) -> Tensor:
        """Writes and returns logits ``[L, V]``."""

    def all_states(self, batch: ForwardBatch, kv_caches: KVCache) -> tuple[Tensor, Tensor]:
        """Final normed hidden states ``[T, H]``, and what a draft head is given ``[T, C]``."""


class StepResult(NamedTuple):
    """Of the rows that get logits."""

    logits: Tensor  # [L, V] in the model's `logits_dtype`
    token_ids: Tensor  # [L] int64, the arg-max
    hidden_states: Tensor | None = None  # [T, C] of all rows, for a draft head


class GraphExecutor(ABC):
    """Steps of padded shapes, of which some were captured. One thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[StepKey, tuple[Any, StepResult]] = {}
        self._wanted: dict[StepKey, None] = {}  # in order
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None  # of captures
        self.num_replays = 0

    @abstractmethod
    def run_eagerly(self, key: StepKey) -> StepResult:
        """As `run`, launch by launch."""

    @property
    def num_graphs(self) -> int:
        """Graphs that were captured."""
        return len(self._graphs)

    @property
    def num_wanted(self) -> int:
        """Graphs that are still to be captured."""
        return len(self._wanted)

    def want_graphs(self, keys: Iterable[StepKey]) -> None:
        """Has `capture_next` capture these, in this order, or `capture` when a step needs one."""
        self._wanted.update(dict.fromkeys(key for key in keys if key not in self._graphs))

    def capture_next(self) -> bool:
        """Captures the next graph, as `capture` does; False if there is none left."""
        if self._wanted:
            self.capture(next(iter(self._wanted)))
        return bool(self._wanted)

    def capture(self, key: StepKey) -> bool:
        """Captures the graph of a shape, if it is still to be captured; whether it was.

        Waits for all that is in flight. It takes about as long as to run such a step launch by
        launch does, and what torch keeps spare is the driver's after it; a shape that cannot be
        captured runs launch by launch ever after, and says so.
        """
        if key not in self._wanted:
            return False
        del self._wanted[key]
        try:
            self._capture(key)
        except RuntimeError as error:
            logger.warning("%s runs without a CUDA graph: %s", key, error)
            self._pool = None  # torch takes the one that failed for still being recorded to
        return True

    def capture_all(self) -> None:
        """Captures every graph that is wanted."""
        while self._wanted:
            self.capture_next()

    def decode_graphs(self, num_seqs: int) -> list[StepKey]:
        """Shapes with a graph that a step of so many decodes may have."""
        decodes = [key for key in self._graphs if key.is_decode and key.num_seqs >= num_seqs]
        size = min((key.num_seqs for key in decodes), default=0)
        return [key for key in decodes if key.num_seqs == size]

    def capture_again(self, keys: Iterable[StepKey]) -> None:
        """Captures graphs that there are anew: a product has another kernel.

        Waits for all that is in flight. Raises RuntimeError where a capture fails.
        """
        for key in keys:
            self._capture(key)

    def run(self, key: StepKey) -> StepResult:
        """Queues a step whose inputs are in the arena."""
        found = self._graphs.get(key)
        if found is None:
            return self.run_eagerly(key)
        graph, result = found
        graph.replay()
        self.num_replays += 1
        return result

    def _capture(self, key: StepKey) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` stays on its stream when the capture fails.
        here = torch.cuda.stream(torch.cuda.current_stream(self._device))
        # Other threads wait for events meanwhile: that must not spoil the capture. And on torch's
        # own stream for captures, a caller's graphs would share cuBLAS's work space with these.
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with here, recording:
            result = self.run_eagerly(key)
        torch.cuda.synchronize(self._device)
        self._graphs[key] = graph, result


class StepExecutor(GraphExecutor):
    """Steps of a model on one arena. ``last_tokens`` ``[rows + 1]`` is what each row drew last.

    With ``keeps_hidden_states`` a step's result has what a draft head is given.
    """

    def __init__(
        self,
        model: DeviceModel,
        kv_caches: KVCache,
        arena: StepArena,
        sampling: SamplingKernels,
        last_tokens: Tensor,
        logits: Tensor,
        *,
        keeps_hidden_states: bool = False,
    ) -> None:
        """``logits`` ``[seats, V]``: one place for all steps, and for all graphs."""
        super().__init__(model.device)
        self.model = model
        self._logits = logits
        self._kv_caches = kv_caches
        self._arena = arena
        self._sampling = sampling
        self._resolve_tokens = cast(DeviceKernels, model.kernels).resolve_tokens
        self._last_tokens = last_tokens
        self._keeps_hidden_states = keeps_hidden_states

    def run_eagerly(self, key: StepKey) -> StepResult:
        """See `GraphExecutor`."""
        if self._keeps_hidden_states:
            return self.run_for_prompts(key)[0]
        inputs = self._arena.inputs(key)
        self._resolve_tokens(inputs.batch.input_ids, self._last_tokens)
        logits = self._logits[: key.num_seqs]
        self.model.forward(inputs.batch, self._kv_caches, logits)
        return self._finish(inputs, logits)

    def run_for_prompts(self, key: StepKey) -> tuple[StepResult, Tensor]:
        """As `run_eagerly`; and the final hidden states ``[T, H]`` of every row."""
        inputs = self._arena.inputs(key)
        self._resolve_tokens(inputs.batch.input_ids, self._last_tokens)
        hidden_states, given = self.model.all_states(inputs.batch, self._kv_caches)
        sampled = hidden_states
        if not key.has_all_logits:
            sampled = hidden_states.index_select(0, inputs.batch.logits_indices)
        logits = self._logits[: key.num_seqs]
        self.model.compute_logits(sampled, logits)
        kept = given if self._keeps_hidden_states else None
        return self._finish(inputs, logits, kept), hidden_states

    def _finish(
        self, inputs: StepInputs, logits: Tensor, hidden_states: Tensor | None = None
    ) -> StepResult:
        token_ids = self._sampling.greedy(logits)
        self._last_tokens.index_copy_(0, inputs.sampled_rows, token_ids)
        return StepResult(logits, token_ids, hidden_states)

    def remember(self, key: StepKey, token_ids: Tensor) -> None:
        """Replaces what a step's rows drew: ``[L]`` int64."""
        self._last_tokens.index_copy_(0, self._arena.inputs(key).sampled_rows, token_ids)
