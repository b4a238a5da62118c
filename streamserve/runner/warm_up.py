"""Meets every size and path that serving can meet, so that no reader is the first to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, islice

from streamserve.core.plan import (
    BlockCopy,
    ModelRunner,
    NewRequest,
    ScheduledRequest,
    SchedulerOutput,
)
from streamserve.core.sampling_params import SamplingParams
from streamserve.runner.memory import MemoryPlan

# Every way through the sampler.
_PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=50),
    SamplingParams(temperature=0.7, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=1.0, repetition_penalty=1.1, frequency_penalty=0.1),
    SamplingParams(temperature=0.0, logprobs=20),
)


class WarmUp:
    """Made-up plans for a runner nobody uses yet. They write rubbish into blocks nobody reads."""

    def __init__(
        self, runner: ModelRunner, memory: MemoryPlan, max_num_batched_tokens: int
    ) -> None:
        self._runner = runner
        self._memory = memory
        self._max_num_batched_tokens = max_num_batched_tokens
        self._step_id = -1
        self._live: list[str] = []

    def run(self, sizes: Sequence[int]) -> None:
        """Runs prompts and decodes of all ``sizes``; raises whatever a step raises."""
        num_seqs = min(self._memory.max_num_seqs, self._max_num_batched_tokens)
        row_counts = [size for size in sizes if size < num_seqs]
        for count in (*row_counts, num_seqs):
            self._step([1] * count, _PARAMS[:1])
        for size in sizes:
            self._step(self._prompts(size), _PARAMS[:1])
        # A full step with decodes in it, whose padding leads to the top of the ladder.
        decodes = min(num_seqs - 1, 4)
        prompts = self._prompts(self._max_num_batched_tokens - decodes)
        self._step([1] * decodes + prompts[: num_seqs - decodes], _PARAMS[:1])
        for params in _PARAMS:
            self._step([1] * num_seqs, (params,))
        self._step([1] * num_seqs, _PARAMS)
        self._step([1], _PARAMS[:1], start=self._memory.max_model_len - 1)
        self._step([], ())

    def _prompts(self, size: int) -> list[int]:
        """Lengths of as few prompts as ``size`` tokens need."""
        size = min(size, self._max_num_batched_tokens)
        longest = self._memory.max_model_len
        full, rest = divmod(size, longest)
        lengths = [longest] * full + ([rest] if rest else [])
        return lengths[: self._memory.max_num_seqs]

    def _step(
        self, lengths: Sequence[int], params: Iterable[SamplingParams], *, start: int | None = None
    ) -> None:
        """One step of fresh requests; those of one token stand behind some others."""
        step_id, released = self._step_id, self._live
        self._step_id -= 1
        self._live = [f"warm-up {step_id} {i}" for i in range(len(lengths))]
        plan = SchedulerOutput(step_id, released_ids=released)
        if self._memory.num_blocks > 1:
            plan.block_copies.append(BlockCopy(0, 1))
        chosen = list(islice(cycle(params), len(lengths)))
        for i, (request_id, length) in enumerate(zip(self._live, lengths, strict=True)):
            start_here = start
            if start_here is None:
                start_here = min(8, self._memory.max_model_len - 1) if length == 1 else 0
            token_ids = [0] * (start_here + length)
            plan.new_requests.append(
                NewRequest(request_id, token_ids, len(token_ids), chosen[i], seed=i, choice_index=0)
            )
            num_blocks = -(-len(token_ids) // self._memory.block_size)
            first = i * num_blocks
            plan.scheduled.append(
                ScheduledRequest(
                    request_id,
                    start_here,
                    token_ids[start_here:],
                    [(first + j) % self._memory.num_blocks for j in range(num_blocks)],
                    True,
                    0,
                )
            )
        self._runner.launch(plan)
        self._runner.sample(step_id).result()
