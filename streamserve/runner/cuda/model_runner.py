"""Runs plans on a device that works by itself: steps are queued, nobody waits but for results.

    event loop         launch(1) sample(1)   launch(2) sample(2)         launch(3) …
    device thread         [q 1]                 [q 2]                       [q 3]
    device                  [ step 1          ]->[ step 2            ]->[ step 3 …
    result thread            waits ........... 1  waits ............ 2
                                               └─ future 1 resolves

The device thread turns a plan into a few launches and never waits for the device. What a step draws
stays there and feeds the next one; the host learns it one step later, from the result thread, which
waits for the one event behind the copy of the ids. (It spins in the driver while it waits.)
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from streamserve.core.plan import (
    BlockCopy,
    Masks,
    ModelRunnerOutput,
    SchedulerOutput,
    StateCopy,
)
from streamserve.errors import DeviceDeadError
from streamserve.models.batch import KVCache, block_caches
from streamserve.runner.compilations import num_compilations
from streamserve.runner.cuda.graphs import StepExecutor, StepResult
from streamserve.runner.cuda.input_batch import DeviceInputBatch, DeviceStep
from streamserve.runner.cuda.memory import free_all_spare, open_runners
from streamserve.runner.cuda.sampling import DeviceSampler, Drawn
from streamserve.runner.cuda.timeline import Mark, Timeline
from streamserve.runner.kv_transfer import KVTransfer
from streamserve.runner.pooling import Pooled, PoolRows, Pools
from streamserve.runner.prompt_logprobs import (
    FoundLogprobs,
    PromptRows,
    PromptsWanted,
    find_logprobs,
)
from streamserve.runner.step_calls import SampleCall, StepCalls, step_output
from streamserve.runner.step_errors import step_error
from streamserve_kernels import Kernels
from streamserve_kernels.uploads import upload

_T = TypeVar("_T")

_IDLE_S = 0.05  # without a plan for so long, graphs are captured

logger = logging.getLogger(__name__)


class _Extras(NamedTuple):
    """What a step found besides what it drew."""

    prompts: FoundLogprobs | None = None
    pooled: Pooled | None = None


_NO_EXTRAS = _Extras()


class _Forwarded(NamedTuple):
    """A step whose forward the device was told of."""

    step: DeviceStep
    result: StepResult
    started: Mark
    extras: _Extras = _NO_EXTRAS
    hidden_states: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Queued:
    """A step that the device was told of; ``drawn`` is None if nobody is sampled."""

    plan: SchedulerOutput
    step: DeviceStep | None
    drawn: Drawn | None
    extras: _Extras
    started: Mark
    ended: Mark
    future: Future[ModelRunnerOutput]
    hidden_states: Tensor | None  # [T, C] for a draft head


class CudaModelRunner:
    """``core.plan.ModelRunner`` on a device. Its methods are for the event loop's thread.

    (Whatever the device, the code is the same: tests run it on a CPU, without graphs.)
    """

    def __init__(
        self,
        kernels: Kernels,
        kv_caches: KVCache,
        batch: DeviceInputBatch,
        executor: StepExecutor,
        sampler: DeviceSampler,
        timeline: Timeline,
        transfer: KVTransfer | None = None,
        state_caches: Sequence[Tensor] = (),
    ) -> None:
        """Plans with stores or loads need a ``transfer``; it is closed with the runner.

        Of the ``kv_caches`` the ``state_caches`` have a row for each slot, all others one for each
        block.
        """
        self._transfer = transfer
        self._kernels = kernels
        self._state_caches = state_caches
        self._block_caches = block_caches(kv_caches, state_caches)
        self._batch = batch
        self._executor = executor
        self._sampler = sampler
        self._timeline = timeline
        self.hidden_states: Tensor | None = None
        """[T, C] of the step whose result is due, in its plan's order, for the results' thread.

        Of an executor that keeps them. What they are is known when the result is.
        """
        self._device = executor.model.device
        self._prompts = PromptsWanted()
        self._pools = Pools()
        self._is_closed = False
        self._calls: StepCalls[Callable[[], None]] = StepCalls()
        self._queued: SimpleQueue[_Queued | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=f"streamserve-{name}", daemon=True)
            for name, work in (("device", self._launch_steps), ("results", self._resolve_steps))
        ]
        open_runners.add(self)
        for thread in self._threads:
            thread.start()

    def on_death(self, hear: Callable[[DeviceDeadError], None]) -> None:
        """See ``core.plan.ModelRunner``."""
        self._calls.on_death(hear)

    @property
    def num_compilations(self) -> int:
        """See ``core.plan.ModelRunner``."""
        return num_compilations(self._kernels)

    def launch(self, plan: SchedulerOutput) -> None:
        """Queue the forward of ``plan``. Raises RuntimeError once closed."""
        self._check_open()
        self._calls.launch(plan)

    def sample(
        self,
        step_id: int,
        masks: Masks | None = None,
        *,
        hear: Callable[[Future[ModelRunnerOutput]], None] | None = None,
    ) -> Future[ModelRunnerOutput]:
        """See ``runner.drafting.Target``. Raises RuntimeError when it is another step's turn."""
        self._check_open()
        return self._calls.sample(step_id, masks, hear)

    def on_device_thread(self, work: Callable[[], _T]) -> _T:
        """Runs ``work`` between two steps and returns what it does; raises what it raises."""
        self._check_open()
        done: Future[_T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

        self._calls.plans.put(run)
        try:
            return done.result()
        except Exception:
            del done  # the error has a frame that has it: they would keep each other
            raise

    def capture_graphs(self) -> None:
        """Captures at once the graphs that are left, which otherwise happens by and by."""
        self.on_device_thread(self._executor.capture_all)

    def close(self) -> None:
        """Finish every step whose sample was asked for, then stop. Idempotent.

        Whoever holds the runner on holds no memory of the device, no graph and no pinned memory.
        The process's last runner leaves no work spaces of cuBLAS either, which torch would keep;
        other CUDA graphs of the process that multiply must not be replayed after it.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._calls.close()
        for thread in self._threads:
            thread.join()
        free_all_spare(self._device)  # a step that was launched, and not asked for, still runs
        if self._transfer is not None:
            self._transfer.close()
        del self._transfer, self._executor, self._batch, self._sampler
        del self._block_caches, self._state_caches
        open_runners.discard(self)
        free_all_spare(self._device)

    def _check_open(self) -> None:
        self._calls.check_open()

    def _launch_steps(self) -> None:
        try:
            self._enter_thread()
            with torch.inference_mode():
                while (plan := self._next_plan()) is not None:
                    if callable(plan):
                        plan()
                    elif not self._launch_step(plan):
                        break
        except BaseException as error:
            logger.critical("the device thread has died", exc_info=error)
            self._calls.fail(error)
        finally:
            self._queued.put(None)

    def _next_plan(self) -> SchedulerOutput | Callable[[], None] | None:
        """The next plan; until it comes, graphs are captured one after the other."""
        patience_s = _IDLE_S
        while self._executor.num_wanted:
            try:
                return self._calls.plans.get(timeout=patience_s)
            except queue.Empty:
                self._executor.capture_next()
                patience_s = 0.0
        return self._calls.plans.get()

    def _launch_step(self, plan: SchedulerOutput) -> bool:
        """Queues a step's forward, then, when it was asked for, its sampling. False: closed."""
        failed: Exception | None = None
        forwarded: _Forwarded | None = None
        started = None if plan.scheduled else self._timeline.mark()
        try:
            forwarded = self._forward(plan)
        except Exception as error:
            failed = error
            self._batch.step_failed(plan)
        call = self._calls.sample_calls.get()
        if call is None:
            return False
        if not call.future.set_running_or_notify_cancel():
            call = SampleCall(call.masks, Future())
        try:
            if failed is not None:
                raise failed
            drawn = None if forwarded is None else self._draw(forwarded, call.masks)
        except Exception as error:
            call.future.set_exception(step_error(error, self._device))
            del failed, forwarded, call  # the error has this frame: they would keep each other
            return True
        except BaseException as error:
            call.fail(error)
            raise
        ended = self._timeline.mark()
        step, extras, hidden_states = None, _NO_EXTRAS, None
        if forwarded is not None:
            step, started, extras = forwarded.step, forwarded.started, forwarded.extras
            hidden_states = forwarded.hidden_states
        assert started is not None
        self._queued.put(
            _Queued(plan, step, drawn, extras, started, ended, call.future, hidden_states)
        )
        return True

    def _forward(self, plan: SchedulerOutput) -> _Forwarded | None:
        for row, request in self._batch.apply(plan):
            self._sampler.begin_history(row, request, self._batch.edits[row])
        self._prompts.apply(plan)
        self._pools.apply(plan)
        if self._transfer is None:
            return self._compute(plan)
        with self._transfer.beside(plan):
            return self._compute(plan)

    def _compute(self, plan: SchedulerOutput) -> _Forwarded | None:
        if plan.block_copies or plan.state_copies:
            self._copy(plan.block_copies, plan.state_copies)
        if not plan.scheduled:
            return None
        step = self._batch.build(plan, self._sampler.count_rows)
        wanted = self._prompts.rows_of(plan)
        pools = self._pools.rows_of(plan) if self._pools.requests else []
        if wanted or pools:
            result, hidden_states = self._executor.run_for_prompts(step.key)
            extras = self._find(hidden_states, wanted, pools, result.logits.shape[1])
            kept = _kept(result, plan.num_tokens)
            step = step.without({part.place for part in pools if part.is_last})
            return _Forwarded(step, result, step.started, extras, kept)
        started = step.started
        # A server that is asked from its first moment on would otherwise never have its graphs.
        if self._executor.capture(step.key):
            started = self._timeline.mark()  # a capture is none of the step's time
        result = self._executor.run(step.key)
        return _Forwarded(step, result, started, hidden_states=_kept(result, plan.num_tokens))

    def _find(
        self,
        hidden_states: Tensor,
        wanted: list[PromptRows],
        pools: list[PoolRows],
        vocab_size: int,
    ) -> _Extras:
        prompts = pooled = None
        if wanted:
            model = self._executor.model
            found = find_logprobs(
                model, hidden_states, wanted, vocab_size, self._batch.logits_sizes
            )
            prompts = self._sampler.fetch_prompts(found)
        if pools:
            pooled = self._sampler.fetch_pooled(self._pools.of_all_rows(pools, hidden_states))
        return _Extras(prompts, pooled)

    def _copy(self, blocks: list[BlockCopy], states: list[StateCopy]) -> None:
        pairs = torch.tensor([*blocks, *states], dtype=torch.int64).t().contiguous()
        src, dst = upload(pairs, self._device)
        count = len(blocks)
        self._kernels.copy_blocks(self._block_caches, src[:count], dst[:count])
        self._kernels.copy_blocks(self._state_caches, src[count:], dst[count:])

    def _draw(self, forwarded: _Forwarded, masks: Masks | None) -> Drawn | None:
        step, (logits, token_ids, _) = forwarded.step, forwarded.result
        if not step.rows.places:
            return None
        if masks or not step.is_greedy:
            token_ids = self._sampler.sample(logits, step, self._batch, masks)
            self._executor.remember(step.key, token_ids)
        return self._sampler.fetch(logits, token_ids, step, self._batch)

    def _enter_thread(self) -> None:
        """CUDA's current device is each thread's own."""
        if self._device.index is not None:
            torch.cuda.set_device(self._device)

    def _resolve_steps(self) -> None:
        self._enter_thread()
        while (queued := self._queued.get()) is not None:
            try:
                queued.ended.wait()
                output = _output(queued)
            except Exception as error:
                queued.future.set_exception(step_error(error, self._device))
            except BaseException as error:
                logger.critical("the results' thread has died", exc_info=error)
                self._calls.fail(error)
                queued.future.set_exception(error)
                return
            else:
                self.hidden_states = queued.hidden_states
                queued.future.set_result(output)
                self.hidden_states = None


def _kept(result: StepResult, num_tokens: int) -> Tensor | None:
    """What the next step does not overwrite."""
    return None if result.hidden_states is None else result.hidden_states[:num_tokens].clone()


def _output(queued: _Queued) -> ModelRunnerOutput:
    """What a step drew, once the device has come past it."""
    plan, step, drawn = queued.plan, queued.step, queued.drawn
    duration_s = queued.ended.seconds_since(queued.started)
    if step is None or drawn is None:
        output = step_output(plan, duration_s=duration_s)
    else:
        rows, token_ids, kept = step.rows.keep(drawn.token_ids(step.logits_rows))
        logprobs = drawn.logprobs(step.logits_rows, kept)
        output = step_output(plan, rows.places, token_ids.tolist(), logprobs, duration_s)
    prompts, pooled = queued.extras
    if prompts is None and pooled is None:
        return output
    return replace(
        output,
        prompt_logprobs=None if prompts is None else prompts.by_request(),
        pooled=None if pooled is None else pooled.by_request(),
        duration_s=None,  # what it took says nothing about other steps
    )
