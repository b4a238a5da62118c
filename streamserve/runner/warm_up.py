"""Meets every size and path that serving can meet, so that no reader is the first to."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol

from streamserve.core.clock import monotonic
from streamserve.core.plan import (
    BlockCopy,
    ModelRunner,
    NewRequest,
    PrefixGroup,
    ScheduledRequest,
    SchedulerOutput,
    StateCopy,
    StateSave,
)
from streamserve.core.pooling import Pooling
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.step_time import StepProfile, StepShape, shape_of
from streamserve.runner.memory import MemoryPlan
from streamserve_kernels.interface import (
    PROMPT_KEY_MULTIPLE,
    PROMPT_KEY_SEGMENT,
    PROMPT_QUERY_MULTIPLE,
)

# Every way through the sampler.
_PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=50),
    SamplingParams(temperature=0.7, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=1.0, repetition_penalty=1.1, frequency_penalty=0.1),
    SamplingParams(temperature=0.0, logprobs=20),
)
_GREEDY = _PARAMS[:1]
_EXTRAS = (
    SamplingParams(bad_words=("a word",), bad_word_ids=((0, 1),)),
    SamplingParams(prompt_logprobs=20),
    *(
        SamplingParams(pooling=Pooling(kind=kind, normalize=normalize))
        for kind, normalize in (("last", True), ("mean", True), ("mean", False))
    ),
)
# The allocator settles when it has seen many orders of sizes: cheap with a small model.
_MIN_MIXED_STEPS, _MAX_MIXED_STEPS, _MIXED_SECONDS = 8, 48, 1.0
# torch takes keys 512 at a time: what is left over is one to four whole multiples.
_MAX_KEY_MULTIPLES = 512 // PROMPT_KEY_MULTIPLE
# Keys come in segments: nothing new comes behind the second.
_LONGEST = 2 * PROMPT_KEY_SEGMENT + 512
_MAX_PREFIX_BLOCKS = 4  # that the requests of a warm-up step share

Work = tuple[int, int]
"""Start and number of the tokens that a request computes."""


@dataclass(frozen=True, slots=True)
class Measuring:
    """What `WarmUp.measure` runs with the whole model, and how long all of it may take.

    ``rows`` are prompts of so many tokens; ``whole_step`` adds the largest.
    """

    rows: tuple[int, ...]
    seconds: float
    whole_step: bool


class Closes(Protocol):
    """A runner, or what it will own."""

    def close(self) -> None:
        """Idempotent."""
        ...


CPU_MEASURING = Measuring((1, 8, 32, 64, 128), seconds=0.7, whole_step=False)
# Rows cost next to nothing until they are hundreds: where the slope begins is what matters.
GPU_MEASURING = Measuring(
    (1, 8, 32, 64, 128, 256, 384, 512, 1024, 2048, 4096), seconds=2.0, whole_step=True
)


@contextmanager
def closed_on_error(opened: Closes) -> Iterator[None]:
    """Closes a runner that does not become warm: its threads would keep the process."""
    try:
        yield
    except BaseException:
        opened.close()
        raise


class WarmUp:
    """Made-up plans for a runner nobody uses yet. They write rubbish into blocks nobody reads."""

    def __init__(
        self,
        runner: ModelRunner,
        memory: MemoryPlan,
        max_num_batched_tokens: int,
        measuring: Measuring = CPU_MEASURING,
    ) -> None:
        self._runner = runner
        self._memory = memory
        self._measuring = measuring
        self._max_tokens = max_num_batched_tokens
        self._max_seqs = min(memory.max_num_seqs, max_num_batched_tokens)
        self._longest = min(memory.max_model_len, _LONGEST)
        self._rng = random.Random(0)
        self._step_id = -1
        self._live: list[str] = []
        self._samples: list[tuple[StepShape, float]] = []

    def run(self, sizes: Sequence[int]) -> None:
        """Runs prompts and decodes of all ``sizes``, and what a CPU's attention tells apart.

        Raises whatever a step raises.
        """
        longest = self._longest
        for size in (*(size for size in sizes if size < self._max_seqs), self._max_seqs):
            self._step(self._decodes(size), _GREEDY)
        for size in sizes:
            self._step(self._prompts(size), _GREEDY)
        # A full step with decodes in it, whose padding leads to the top of the ladder.
        num_decodes = min(self._max_seqs - 1, 4)
        prompts = self._prompts(self._max_tokens - num_decodes)
        decodes = self._decodes(num_decodes)
        self._step(decodes + prompts[: self._max_seqs - num_decodes], _GREEDY)
        for length in range(PROMPT_QUERY_MULTIPLE, self._max_tokens + 1, PROMPT_QUERY_MULTIPLE):
            for count in range(1, _MAX_KEY_MULTIPLES + 1):
                if count * PROMPT_KEY_MULTIPLE + length <= longest:
                    self._step([(count * PROMPT_KEY_MULTIPLE, length)], _GREEDY)
        # The most that attention can ask for: a chunk behind several segments of keys.
        last = min(self._max_tokens, longest)
        self._step([(longest - last, last)], _GREEDY)
        self._run_mixed()
        self._step([], ())

    def run_ragged(self) -> None:
        """Runs steps of every make-up rather than of every size, for a device that pads.

        Few and many decodes, at the start and behind a long context; prompts alone, behind a
        context, and beside decodes; requests that share leading blocks.
        """
        longest, seats = self._longest, self._max_seqs
        for count in sorted({1, min(2, seats), seats}):
            self._step(self._decodes(count), _GREEDY)
            self._step([(longest - 1, 1)] * count, _GREEDY)
            self._step([(longest - 1, 1)] * count, _GREEDY, share_prefix=True)
        for size in sorted({min(size, self._max_tokens) for size in (2, 16, 17, 64, 512)}):
            chunk = min(size, longest)
            for work in ([(0, chunk)], [(longest - chunk, chunk)]):
                decodes = [(longest - 1, 1)] * min(seats - 1, 7, self._max_tokens - chunk)
                self._step(work, _GREEDY)
                self._step(decodes + work, _GREEDY)
                self._step(decodes + work, _GREEDY, share_prefix=True)
        self._run_mixed()
        self._step([], ())

    def _run_mixed(self) -> None:
        deadline = monotonic() + _MIXED_SECONDS
        for count in range(_MAX_MIXED_STEPS):
            if count >= _MIN_MIXED_STEPS and monotonic() > deadline:
                break
            self._step(self._mixed(), _PARAMS)

    def run_sampler(self) -> None:
        """Runs every way through the sampler, on all seats."""
        for params in _PARAMS:
            self._step(self._decodes(self._max_seqs), (params,))
        self._step([], ())

    def run_extras(self) -> None:
        """Runs what only a few requests ask for, since a device loads kernels at their first call.

        Words of several tokens that must not come, vectors of prompts, logprobs of prompts.
        """
        size = max(min(4, self._longest - 1, self._max_tokens // 4), 1)
        for params in _EXTRAS:
            self._step([(0, size)], (params,))
            self._step([(1, size)], (params,))
        self._step([], ())

    def run_drafts(self, num_drafts: int) -> None:
        """Runs every way through the sampler behind ``num_drafts`` drafts of a request."""
        most = min(num_drafts, self._longest - 1, self._max_tokens - 1)
        if most < 1:
            return
        for params in _PARAMS:
            work = [(self._longest - 1 - most, 1 + most)]
            self._step(work, (params,), num_drafts=most)
        self._step([], ())

    def run_guesses(self) -> None:
        """Feeds what drafts, and has it guess, for a few requests and for one in each seat."""
        self._step(self._prompts(self._max_tokens), _GREEDY)
        for count in sorted({1, min(2, self._max_seqs), self._max_seqs}):
            self._step(self._decodes(count), _GREEDY, num_guesses=2)
        self._step([], ())

    def run_full_steps(self) -> None:
        """Runs the largest prompt and the largest batch: what a whole model needs room for."""
        self._step(self._prompts(self._max_tokens), _GREEDY)
        self._step(self._decodes(self._max_seqs), _GREEDY)
        self._step([], ())

    def measure(self, padded_sizes: Sequence[int] = ()) -> StepProfile:
        """Measures steps of a few sizes, for a second or two: serving learns the rest.

        ``padded_sizes`` is the ladder that the runner pads steps to.
        """
        self._samples.clear()
        deadline = monotonic() + self._measuring.seconds
        longest = self._longest
        largest = min(self._max_tokens, longest)
        rows = [rows for rows in self._measuring.rows if rows < largest]
        if self._measuring.whole_step:
            rows.append(largest)
        few, some = min(8, self._max_seqs), min(64, self._max_tokens, longest)
        behind = [[(longest - 1, 1)] * few, [(longest - some, some)]]
        # The second time counts: the first may meet cold memory.
        for work in (*([(0, n)] for n in rows), *behind, *([(0, n)] for n in rows[:-1])):
            if monotonic() > deadline and len(self._samples) > 2:
                break
            self._step(work, _GREEDY)
        samples = tuple(self._samples)
        self._step([], ())
        return StepProfile(samples, tuple(padded_sizes))

    def _decodes(self, count: int) -> list[Work]:
        return [(min(8, self._memory.max_model_len - 1), 1)] * count

    def _prompts(self, size: int) -> list[Work]:
        """As few prompts as ``size`` tokens need."""
        longest = self._longest
        full, rest = divmod(min(size, self._max_tokens), longest)
        lengths = [longest] * full + ([rest] if rest else [])
        return [(0, length) for length in lengths[: self._max_seqs]]

    def _mixed(self) -> list[Work]:
        """Decodes at any depth, and a chunk of a prompt."""
        rng = self._rng
        longest = self._longest
        num_decodes = rng.randrange(self._max_seqs)
        work = [(rng.randrange(longest), 1) for _ in range(num_decodes)]
        length = min(rng.randint(1, self._max_tokens - num_decodes), longest)
        return [*work, (rng.randint(0, longest - length), length)]

    def _step(
        self,
        work: Sequence[Work],
        params: Iterable[SamplingParams],
        *,
        share_prefix: bool = False,
        num_drafts: int = 0,
        num_guesses: int = 0,
    ) -> None:
        """One step of fresh requests, which share blocks; ``share_prefix``: the plan says so."""
        plan = SchedulerOutput(self._step_id, released_ids=self._live)
        self._step_id -= 1
        self._live = [f"warm-up {plan.step_id} {i}" for i in range(len(work))]
        num_blocks, block_size = self._memory.num_blocks, self._memory.block_size
        shared = min([_MAX_PREFIX_BLOCKS, *(start // block_size for start, _ in work)])
        if share_prefix and shared and len(work) > 1:
            plan.prefix_groups.append(PrefixGroup(tuple(range(len(work))), shared))
        if num_blocks > 1:
            plan.block_copies.append(BlockCopy(0, 1))
        num_slots = self._memory.num_state_slots
        if num_slots > len(work) > 0:
            plan.state_copies.append(StateCopy(num_slots - 1, 0))
            plan.state_saves.append(StateSave(0, sum(work[0]), num_slots - 1))
        for i, ((start, length), chosen) in enumerate(
            zip(work, islice(cycle(params), len(work)), strict=True)
        ):
            request_id, token_ids = self._live[i], [0] * (start + length)
            plan.new_requests.append(
                NewRequest(
                    request_id,
                    token_ids,
                    len(token_ids),
                    chosen,
                    seed=i,
                    choice_index=0,
                    state_slot=i if i < num_slots else None,
                )
            )
            first = 0 if plan.prefix_groups else i
            blocks = [(first + j) % num_blocks for j in range(-(-len(token_ids) // block_size))]
            plan.scheduled.append(
                ScheduledRequest(request_id, start, token_ids[start:], blocks, 1 + num_drafts, 0)
            )
            if num_guesses:
                plan.num_drafts[request_id] = num_guesses
        self._runner.launch(plan)
        output = self._runner.sample(plan.step_id).result()
        if output.duration_s is not None and plan.scheduled:
            self._samples.append((shape_of(plan), output.duration_s))
