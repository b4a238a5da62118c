"""Runs plans on one device thread: forward, then sampling, strictly in turn.

    event loop        launch(1)  sample(1)      launch(2)  sample(2)
    device thread          [ forward 1 ][ sample 1 ]  [ forward 2 ][ sample 2 ]
                                             └─ future 1 resolves

Both calls only put something into a queue. The thread takes one plan, runs its forward, then takes
one sample call: step 2 may be launched while step 1 is still running, but its forward starts when
step 1 has been sampled, since it may compute the very tokens that step 1 draws.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Never, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamserve.core.clock import Clock, monotonic
from streamserve.core.plan import (
    BlockCopy,
    Masks,
    ModelRunnerOutput,
    SchedulerOutput,
    TokenLogprobs,
)
from streamserve.errors import DeviceDeadError
from streamserve.models.batch import ForwardBatch, KVCache, block_caches
from streamserve.runner.compilations import num_compilations
from streamserve.runner.input_batch import InputBatch
from streamserve.runner.kv_transfer import KVTransfer
from streamserve.runner.plan_arrays import StepRows
from streamserve.runner.pooling import Pooled, PoolRows, Pools, of_last_rows
from streamserve.runner.prompt_logprobs import (
    FoundLogprobs,
    PromptModel,
    PromptRows,
    PromptsWanted,
    all_hidden_states,
    find_logprobs,
)
from streamserve.runner.sampler import Sampler
from streamserve.runner.step_calls import SampleCall, StepCalls, step_output
from streamserve.runner.step_errors import step_error
from streamserve_kernels import Kernels, load_row_draws

if TYPE_CHECKING:
    from streamserve_kernels.native.sampling import RowDraws

logger = logging.getLogger(__name__)

_HEAD_SIZES = (8, 16, 32, 64, 128)  # rows of a prompt that get logits together


class ForwardModel(PromptModel, Protocol):
    """What the runner needs of a ``streamserve.models.Decoder``."""

    @property
    def device(self) -> torch.device:
        """Where batches and caches live."""

    @property
    def kernels(self) -> Kernels:
        """The backend; the runner calls ``copy_blocks``."""

    def forward(self, batch: ForwardBatch, kv_caches: KVCache) -> Tensor:
        """Logits ``[L, V]`` float32."""

    def forward_with_states(self, batch: ForwardBatch, kv_caches: KVCache) -> tuple[Tensor, Tensor]:
        """As ``forward``, with the final normed hidden states ``[L, H]``."""

    def greedy(self, batch: ForwardBatch, kv_caches: KVCache) -> Tensor | None:
        """The likeliest token ``[L]`` int64 of each row; None, nothing having run: use forward."""

    def forward_with_all_states(
        self, batch: ForwardBatch, kv_caches: KVCache
    ) -> tuple[Tensor, Tensor]:
        """As ``forward``, with what a draft head is given of all rows ``[T, C]``."""

    def greedy_with_all_states(
        self, batch: ForwardBatch, kv_caches: KVCache
    ) -> tuple[Tensor, Tensor] | None:
        """As ``greedy``, with the same; None, nothing having run: use the one before."""

    def all_states(self, batch: ForwardBatch, kv_caches: KVCache) -> tuple[Tensor, Tensor]:
        """Final normed hidden states ``[T, H]``, and what a draft head is given ``[T, C]``."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A forward that has run, and whose rows were sampled or wait for it.

    Where everybody wants the likeliest token, those are there and the logits ``[L, V]`` are not.
    """

    rows: StepRows | None = None
    logits: Tensor | None = None
    token_ids: Tensor | None = None
    prompts: FoundLogprobs | None = None
    pooled: Pooled | None = None
    is_ordinary: bool = True  # it took as long as others of its shape


class TorchModelRunner:
    """``core.plan.ModelRunner`` on a torch device. Its methods are for the event loop's thread.

    Everything else happens on the thread that the constructor starts: torch keeps one pool of
    workers per calling thread, and the books need no lock.
    """

    def __init__(
        self,
        model: ForwardModel,
        kv_caches: KVCache,
        *,
        vocab_size: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        padded_sizes: Sequence[int] = (),
        transfer: KVTransfer | None = None,
        state_caches: Sequence[Tensor] = (),
        keeps_hidden_states: bool = False,
        sampler: Callable[[int, int, RowDraws | None], Sampler] = Sampler,
        clock: Clock = monotonic,
    ) -> None:
        """``clock`` measures what a step takes on the device thread.

        Plans with stores or loads need a ``transfer``; it is closed with the runner. Of the
        ``kv_caches`` the ``state_caches`` have a row for each slot, all others one for each block.
        With ``keeps_hidden_states`` those of the last step are in ``hidden_states``.
        """
        self._clock = clock
        self._model = model
        self._kernels = model.kernels
        self._kv_caches = kv_caches
        self._transfer = transfer
        self._state_caches = state_caches
        self._block_caches = block_caches(kv_caches, state_caches)
        self._keeps_hidden_states = keeps_hidden_states
        self.hidden_states: Tensor | None = None
        """[T, C] of the step that ran last, in its plan's order, for the device thread."""
        self._input_batch = InputBatch(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            block_size=block_size,
            vocab_size=vocab_size,
            device=model.device,
            padded_sizes=padded_sizes,
            keeps_states=bool(state_caches),
        )
        self._sampler = sampler(vocab_size, max_num_seqs, load_row_draws(vocab_size))
        self._vocab_size = vocab_size
        self._prompts = PromptsWanted()
        self._pools = Pools()
        self._calls: StepCalls[Never] = StepCalls()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="streamserve-device", daemon=True)
        self._thread.start()

    def replace_model(self, model: ForwardModel) -> None:
        """Run later steps with ``model``, which takes the same caches. Only between two steps."""
        if self._calls.unsampled:
            raise RuntimeError(f"steps are in flight: {self._calls.unsampled}")
        self._model = model

    def launch(self, plan: SchedulerOutput) -> None:
        """Queue the forward of ``plan``. Raises RuntimeError once closed."""
        self._calls.launch(plan)

    def sample(
        self,
        step_id: int,
        masks: Masks | None = None,
        *,
        hear: Callable[[Future[ModelRunnerOutput]], None] | None = None,
    ) -> Future[ModelRunnerOutput]:
        """See ``runner.drafting.Target``. Raises RuntimeError when it is another step's turn."""
        return self._calls.sample(step_id, masks, hear)

    def on_death(self, hear: Callable[[DeviceDeadError], None]) -> None:
        """See ``core.plan.ModelRunner``."""
        self._calls.on_death(hear)

    @property
    def num_compilations(self) -> int:
        """Kernels compiled so far, ours and those of ``torch.compile``."""
        return num_compilations(self._kernels)

    def close(self) -> None:
        """Finish every step whose sample was asked for, then stop. Idempotent.

        Whoever holds the runner on holds neither weights nor cache.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._calls.close()
        self._thread.join()
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None
        self.hidden_states = None
        del self._model, self._kv_caches, self._block_caches, self._state_caches, self._input_batch

    def _work(self) -> None:
        try:
            with torch.inference_mode():
                while (plan := self._calls.plans.get()) is not None:
                    if not self._run_step(plan):
                        return
        except BaseException as error:
            # Raised on, it would only end this thread: the engine hears of it, and says so.
            logger.critical("the device thread has died", exc_info=error)
            self._calls.fail(error)

    def _run_step(self, plan: SchedulerOutput) -> bool:
        """False: closed, and this step was not asked for."""
        launched: Launched | Exception
        started = self._clock()
        try:
            launched = self._forward(plan)
        except Exception as error:
            launched = error
        forward_s = self._clock() - started
        call = self._calls.sample_calls.get()
        if call is None:
            return False
        try:
            self._resolve(plan, launched, call, forward_s)
        except BaseException as error:
            call.fail(error)
            raise
        return True

    def _forward(self, plan: SchedulerOutput) -> Launched:
        self._input_batch.apply(plan)
        self._prompts.apply(plan)
        self._pools.apply(plan)
        if self._transfer is None:
            return self._compute(plan)
        with self._transfer.beside(plan):
            return self._compute(plan)

    def _compute(self, plan: SchedulerOutput) -> Launched:
        if plan.block_copies:
            self._copy_blocks(plan.block_copies)
        for src, dst in plan.state_copies:
            for cache in self._state_caches:
                cache[dst] = cache[src]
        if not plan.scheduled:
            return Launched()
        batch, rows = self._input_batch.build(plan)
        self.hidden_states = None
        if self._pools.requests and (pools := self._pools.rows_of(plan)):
            return self._compute_pools(batch, rows, pools, self._prompts.rows_of(plan))
        if wanted := self._prompts.rows_of(plan):
            return self._compute_prompts(batch, rows, wanted)
        if self._keeps_hidden_states:
            return self._compute_states(batch, rows)
        if rows.places and self._input_batch.is_greedy(rows):
            token_ids = self._model.greedy(batch, self._kv_caches)
            if token_ids is not None:
                return Launched(rows, token_ids=token_ids)
        return Launched(rows, logits=self._model.forward(batch, self._kv_caches))

    def _compute_states(self, batch: ForwardBatch, rows: StepRows) -> Launched:
        model = self._model
        if rows.places and self._input_batch.is_greedy(rows):
            found = model.greedy_with_all_states(batch, self._kv_caches)
            if found is not None:
                token_ids, self.hidden_states = found
                return Launched(rows, token_ids=token_ids)
        logits, self.hidden_states = model.forward_with_all_states(batch, self._kv_caches)
        return Launched(rows, logits=logits)

    def _compute_prompts(
        self, batch: ForwardBatch, rows: StepRows, wanted: list[PromptRows]
    ) -> Launched:
        hidden_states = self._all_hidden_states(batch)
        logits = self._model.compute_logits(hidden_states.index_select(0, batch.logits_indices))
        found = find_logprobs(self._model, hidden_states, wanted, self._vocab_size, _HEAD_SIZES)
        return Launched(rows, logits=logits, prompts=found, is_ordinary=False)

    def _compute_pools(
        self, batch: ForwardBatch, rows: StepRows, pools: list[PoolRows], wanted: list[PromptRows]
    ) -> Launched:
        every_row = (
            self._keeps_hidden_states
            or bool(wanted)
            or any(part.pooling.needs_every_row for part in pools)
        )
        if every_row:
            hidden_states = self._all_hidden_states(batch)
            vectors = self._pools.of_all_rows(pools, hidden_states)
            states = hidden_states.index_select(0, batch.logits_indices)
            logits = self._model.compute_logits(states)
        else:
            logits, states = self._model.forward_with_states(batch, self._kv_caches)
            vectors = of_last_rows(pools, rows.places, states)
        found = None
        if wanted:
            found = find_logprobs(self._model, hidden_states, wanted, self._vocab_size, _HEAD_SIZES)
        others, kept = rows.without({part.place for part in pools if part.is_last})
        logits = logits[torch.from_numpy(kept)]
        return Launched(
            others,
            logits=logits,
            prompts=found,
            pooled=Pooled(vectors),
            is_ordinary=not every_row,
        )

    def _all_hidden_states(self, batch: ForwardBatch) -> Tensor:
        if not self._keeps_hidden_states:
            return all_hidden_states(self._model, batch, self._kv_caches)
        hidden_states, self.hidden_states = self._model.all_states(batch, self._kv_caches)
        return hidden_states

    def _copy_blocks(self, copies: list[BlockCopy]) -> None:
        pairs = torch.tensor(copies, dtype=torch.int64).to(self._model.device)
        self._kernels.copy_blocks(
            self._block_caches, pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
        )

    def _resolve(
        self,
        plan: SchedulerOutput,
        launched: Launched | Exception,
        call: SampleCall,
        forward_s: float,
    ) -> None:
        started = self._clock()
        is_awaited = call.future.set_running_or_notify_cancel()
        try:
            if isinstance(launched, Exception):
                raise launched
            output = self._sample(plan, launched, call.masks)
        except Exception as error:
            self._input_batch.record_failure(plan)
            if is_awaited:
                call.future.set_exception(step_error(error, self._model.device))
        else:
            if is_awaited:
                if launched.is_ordinary:  # else it says nothing about other steps
                    output = replace(output, duration_s=forward_s + self._clock() - started)
                call.future.set_result(output)

    def _sample(
        self, plan: SchedulerOutput, launched: Launched, masks: Masks | None
    ) -> ModelRunnerOutput:
        rows = launched.rows
        if rows is None or not rows.places:
            output = step_output(plan)
        else:
            rows, token_ids, row_logprobs = self._draw(launched, rows, masks)
            self._input_batch.record(rows, token_ids)
            output = step_output(plan, rows.places, token_ids.tolist(), row_logprobs)
        if launched.prompts is not None:
            output = replace(output, prompt_logprobs=launched.prompts.by_request())
        if launched.pooled is not None:
            output = replace(output, pooled=launched.pooled.by_request())
        return output

    def _draw(
        self, launched: Launched, rows: StepRows, masks: Masks | None
    ) -> tuple[StepRows, NDArray[np.int64], list[list[TokenLogprobs]] | None]:
        """The samples that count, their ids, and their logprobs if anybody asks."""
        # Rows past those that were asked for are padding.
        num_rows = len(rows.places)
        if launched.token_ids is not None:
            if masks:
                raise RuntimeError("a mask came for requests that were greedy when they started")
            rows, token_ids, _ = rows.keep(launched.token_ids[:num_rows].cpu().numpy())
            return rows, token_ids, None
        assert launched.logits is not None
        on_host: NDArray[np.float32] = launched.logits[:num_rows].cpu().numpy()
        wanted = self._input_batch.sampling_batch(rows, masks)
        if wanted is None:
            rows, token_ids, _ = rows.keep(self._sampler.greedy(on_host))
            return rows, token_ids, None
        rows, token_ids, kept = rows.keep(self._sampler.sample(on_host, wanted))
        if (wanted.num_logprobs < 0).all():
            return rows, token_ids, None
        logprobs = self._sampler.logprobs(on_host[kept], token_ids, wanted.num_logprobs[kept])
        return rows, token_ids, logprobs
