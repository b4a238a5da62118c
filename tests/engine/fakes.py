"""A runner that answers by script and can be held, broken or moved to a thread; and an engine."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from streamserve.config import CacheConfig, SchedulerConfig
from streamserve.core.clock import monotonic
from streamserve.core.death import Death
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.plan import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.scheduler import Scheduler
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.grammar import Grammars
from streamserve.engine.grammar_trial import GrammarTrial, Task, Verdict
from streamserve.engine.outputs import RequestOutput, merge_outputs
from streamserve.engine.stream import RequestStream
from streamserve.errors import OutOfMemoryError

EOS = 257
PROMPT = list(b"Once upon a time there was")
LONG = 300.0  # seconds: no machine is too slow for it


class SpoiltError(Exception):
    """A step had a request that no step can have."""


class FakeRunner:
    """Samples ``answers[request_id]`` by output position, then EOS for ever.

    ``hold``: a step's future stays open until ``release``. ``failing``: step ids whose ``launch``
    or ``sample`` result raises. ``threaded``: futures resolve on another thread. ``spoilt``:
    requests that no step can have. ``max_tokens``: there is no memory for a step with more.
    After ``death.tell`` nothing can be launched any more.
    """

    num_compilations = 0

    def __init__(
        self,
        answers: dict[str, str | bytes | list[int]] | None = None,
        *,
        default: str = "Hello, world!",
        hold: bool = False,
        threaded: bool = False,
        spoilt: Set[str] = frozenset(),
        max_tokens: int = 10**6,
    ) -> None:
        self.answers = answers or {}
        self.default = default
        self.hold = hold
        self.failing_launches: set[int] = set()
        self.failing_samples: set[int] = set()
        self.fail_all = False
        self.spoilt = spoilt
        self.max_tokens = max_tokens
        self.error: Exception = RuntimeError("device-side assert")
        self.plans: list[SchedulerOutput] = []
        self.known: dict[str, Any] = {}
        self.is_closed = False
        self.death = Death()
        self.on_death = self.death.on_death
        self._held: list[tuple[Future[ModelRunnerOutput], SchedulerOutput]] = []
        self._launched = asyncio.Event()
        self._pool = ThreadPoolExecutor(1) if threaded else None

    def launch(self, plan: SchedulerOutput) -> None:
        if self.death.cause is not None:
            raise self.death.cause
        self.plans.append(plan)
        self._launched.set()
        for request_id in plan.released_ids:
            del self.known[request_id]
        for new in plan.new_requests:
            assert new.request_id not in self.known
            self.known[new.request_id] = new
        assert all(s.request_id in self.known for s in plan.scheduled)
        if plan.step_id in self.failing_launches or self.fail_all:
            raise RuntimeError("it cannot be launched")

    def sample(self, step_id, masks=None) -> Future[ModelRunnerOutput]:
        plan = self.plans[-1]
        assert plan.step_id == step_id
        future: Future[ModelRunnerOutput] = Future()
        if self.hold:
            self._held.append((future, plan))
        elif self._pool is not None:
            self._pool.submit(self._resolve, future, plan)
        else:
            self._resolve(future, plan)
        return future

    def close(self) -> None:
        self.is_closed = True
        if self._pool is not None:
            self._pool.shutdown()

    async def launched(self) -> SchedulerOutput:
        """Wait until a step is held, and return the newest."""
        while not self._held:
            self._launched.clear()
            await self._launched.wait()
            await asyncio.sleep(0)
        return self.plans[-1]

    async def release(self, num_steps: int = 1) -> None:
        """Let the next held steps end, one after the other."""
        for _ in range(num_steps):
            await self.launched()
            self._resolve(*self._held.pop(0))
            await turns(4)

    def release_all(self) -> None:
        self.hold = False
        for future, plan in self._held:
            self._resolve(future, plan)
        self._held.clear()

    def _resolve(self, future: Future[ModelRunnerOutput], plan: SchedulerOutput) -> None:
        error = self._error_of(plan)
        if error is not None:
            future.set_exception(error)
            return
        sampled = [self._tokens(s) for s in plan.scheduled]
        logprobs = [
            [TokenLogprobs(i, -1.0, ((i, -1.0),)) for i in ids]
            if self.known[s.request_id].sampling_params.logprobs is not None
            else []
            for s, ids in zip(plan.scheduled, sampled, strict=True)
        ]
        future.set_result(ModelRunnerOutput(plan.step_id, sampled, logprobs))

    def _error_of(self, plan: SchedulerOutput) -> Exception | None:
        if plan.num_tokens > self.max_tokens:
            return OutOfMemoryError("no memory for this step")
        if any(s.request_id in self.spoilt for s in plan.scheduled):
            return SpoiltError()
        return self.error if plan.step_id in self.failing_samples else None

    def _tokens(self, scheduled) -> list[int]:
        answer = self.answers.get(scheduled.request_id, self.default)
        ids = answer.encode() if isinstance(answer, str) else answer
        first = scheduled.output_position
        samples = [*ids[first : first + scheduled.sample]]
        samples += [EOS] * (scheduled.sample - len(samples))
        return samples[: scheduled.num_kept(samples)]


async def turns(n: int = 8) -> None:
    """Let everything that is ready run."""
    for _ in range(n):
        await asyncio.sleep(0)


@dataclass
class Harness:
    """An engine over real scheduling and a fake device, and short words for what tests do."""

    engine: AsyncEngine
    scheduler: Scheduler
    runner: Any
    streams: list[RequestStream] = field(default_factory=list)

    def submit(self, request_id: str = "r", prompt: list[int] | None = None, **params: Any):
        params.setdefault("max_tokens", 64)
        stream = self.engine.submit(
            list(PROMPT if prompt is None else prompt),
            SamplingParams(**params),
            request_id=request_id,
        )
        self.streams.append(stream)
        return stream

    async def answer(self, request_id: str = "r", prompt: list[int] | None = None, **params: Any):
        """Submit and read to the end: one output."""
        return await collect(self.submit(request_id, prompt, **params))

    @property
    def num_held_blocks(self) -> int:
        cache = self.scheduler.kv_cache
        return cache.num_blocks - cache.num_free_blocks


@contextlib.asynccontextmanager
async def serving(
    runner: Any,
    *,
    scheduler_class: Callable[..., Scheduler] = Scheduler,
    num_blocks: int = 64,
    tokenizer: Any = None,
    vocab_size: int | None = None,
    **config: Any,
) -> AsyncIterator[Harness]:
    config = {"max_model_len": 512, "max_num_seqs": 8, **config}
    scheduler = scheduler_class(
        SchedulerConfig(**config), KVCacheManager(CacheConfig(num_blocks=num_blocks)), monotonic
    )
    engine = AsyncEngine(
        scheduler=scheduler,
        runner=runner,
        tokenizer=tokenizer or ByteTokenizer(),
        eos_token_ids=frozenset({EOS}),
        max_model_len=config["max_model_len"],
        vocab_size=vocab_size,
        grammars=patient_grammars(tokenizer or ByteTokenizer(), vocab_size=vocab_size),
        idle_delay_s=0.0,
    )
    await engine.start()
    try:
        yield Harness(engine, scheduler, runner)
    finally:
        if isinstance(runner, FakeRunner):
            runner.release_all()
        await engine.stop()
    if not engine.is_dead:
        assert engine.is_idle
        scheduler.check_integrity()
        assert scheduler.kv_cache.num_free_blocks == num_blocks
    assert getattr(runner, "is_closed", True)  # a real one has its thread to show


class NothingForced(Scheduler):
    """Makes every token of a grammar wait for the one before."""

    def guide(self, request, find_forced):
        pass


class SharedTrial:
    """A worker for all engines of these special tokens: to start one takes a fifth of a second."""

    def __init__(self, special_tokens: tuple[bytes, ...]) -> None:
        self._trial = GrammarTrial(special_tokens)
        self._lock = threading.Lock()
        atexit.register(self._trial.close)

    def __call__(self, task: Task) -> Verdict:
        with self._lock:
            return self._trial(task)

    def close(self) -> None:
        """Others use it."""


_shared_trial = cache(SharedTrial)


def patient_grammars(
    tokenizer: Any,
    eos_token_ids: Set[int] = frozenset({EOS}),
    vocab_size: int | None = None,
    **options: Any,
) -> Grammars:
    """They refuse nothing because the machine is busy."""
    return Grammars(
        tokenizer,
        frozenset(eos_token_ids),
        vocab_size or tokenizer.vocab_size,
        **{
            "timeout_s": LONG,
            "new_trial": lambda special_tokens: _shared_trial(tuple(special_tokens)),
            **options,
        },
    )


async def collect(stream: RequestStream) -> RequestOutput:
    """Everything a stream says, as one output."""
    merged = merge_outputs([output async for output in stream])
    assert merged.finish_reason is not None
    return merged
