"""From a loaded model and a memory plan to a runner on a device that is warm."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from streamserve.config import MAX_FORCED_TOKENS
from streamserve.core.clock import monotonic
from streamserve.core.plan import ModelRunner
from streamserve.core.step_time import StepProfile
from streamserve.models import DraftHead, KVCache, LanguageModel, state_caches
from streamserve.runner.cuda.graphs import DeviceModel, StepExecutor
from streamserve.runner.cuda.head_steps import DeviceHeadSteps
from streamserve.runner.cuda.input_batch import DeviceInputBatch
from streamserve.runner.cuda.model_runner import CudaModelRunner
from streamserve.runner.cuda.sampling import DeviceSampler
from streamserve.runner.cuda.step_key import StepLadder
from streamserve.runner.cuda.timeline import timeline_of
from streamserve.runner.drafting import DraftingRunner
from streamserve.runner.head_drafter import draft_with_head
from streamserve.runner.kv_transfer import KVTransfer
from streamserve.runner.memory import MemoryPlan
from streamserve.runner.tensor_parallel.cuda_drawing import rank_sampler
from streamserve.runner.tensor_parallel.team import Team, steered
from streamserve.runner.warm_up import GPU_MEASURING, WarmUp, closed_on_error
from streamserve_kernels import load_sampling

logger = logging.getLogger(__name__)

_FIRST_DECODES = 8  # batches up to this size have graphs when the server is ready
_SWITCH_INTERVAL_S = 0.0005


def build_cuda_runner(
    model: LanguageModel,
    memory: MemoryPlan,
    ladder: StepLadder,
    *,
    max_num_batched_tokens: int,
    kv_caches: KVCache,
    enforce_eager: bool = False,
    transfer: KVTransfer | None = None,
    keeps_hidden_states: bool = False,
    team: Team | None = None,
) -> tuple[ModelRunner, StepProfile]:
    """Makes the arena, meets every shape of ``ladder`` once, captures the first graphs, measures.

    After it nothing compiles. The remaining graphs are captured while nobody asks for anything, or
    when a step needs one; with a ``team``, where the model is a share and the runner that of all
    ranks, they are captured here. ``enforce_eager`` means none at all. ``keeps_hidden_states``: for
    a draft head. Raises what torch raises when the memory is not there after all.
    """
    # The device thread holds the interpreter while it launches a large step; the event loop should
    # not have to wait 5 ms for its turn.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    tune_linears(model, ladder)
    own, executor = assemble(
        model.one_of_each_layer(),
        kv_caches,
        ladder,
        vocab_size=model.spec.vocab_size,
        block_size=memory.block_size,
        max_model_len=memory.max_model_len,
        max_num_seqs=memory.max_num_seqs,
        transfer=transfer,
        state_caches=state_caches(model.spec, kv_caches),
        keeps_hidden_states=keeps_hidden_states,
        sampler=DeviceSampler if team is None else partial(rank_sampler, team.ranks),
    )

    def use_whole_model() -> None:
        # Behind the steps that are queued: another rank's may not have been launched yet.
        own.on_device_thread(lambda: setattr(executor, "model", model))

    def capture() -> None:
        executor.want_graphs(ladder.graphs())
        if team is None:
            own.on_device_thread(lambda: _capture_first(executor, ladder))
        else:
            own.capture_graphs()

    started = monotonic()
    with closed_on_error(own):
        num_shapes = own.on_device_thread(lambda: _meet_shapes(executor, ladder))
    runner, call = steered(own, {"whole model": use_whole_model, "graphs": capture}, team)
    with closed_on_error(runner):
        warm_up = WarmUp(runner, memory, max_num_batched_tokens, GPU_MEASURING)
        warm_up.run_ragged()
        warm_up.run_sampler()
        warm_up.run_extras()
        num_forced = min(MAX_FORCED_TOKENS, ladder.largest.num_seqs - 1)
        warm_up.run_drafts(ladder.num_drafts or num_forced)
        call("whole model")
        warm_up.run_full_steps()
        logger.info("%d shapes met in %.1f s", num_shapes, monotonic() - started)
        if not enforce_eager and model.device.type == "cuda":
            call("graphs")
        return runner, warm_up.measure()


def draft_with_device_head(
    runner: CudaModelRunner,
    head: DraftHead,
    kv_caches: KVCache,
    memory: MemoryPlan,
    *,
    max_num_batched_tokens: int,
    enforce_eager: bool = False,
) -> DraftingRunner:
    """A warm runner with a head that guesses behind its steps; it has met all of its shapes."""
    steps = DeviceHeadSteps(
        head,
        kv_caches,
        block_size=memory.block_size,
        max_model_len=memory.max_model_len,
        max_num_seqs=memory.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    tune_linears(head, steps.ladder)
    steps.warm_up(with_graphs=not enforce_eager and head.device.type == "cuda")
    return draft_with_head(runner, steps, memory, max_num_batched_tokens)


def tune_linears(model: LanguageModel | DraftHead, ladder: StepLadder) -> None:
    """Chooses the kernels of the linear layers, where the backend has a choice; once per device.

    What was measured is kept on disk. Decodes of every size matter, and so do steps of a few
    hundred rows.
    """
    if model.kernels.name == "triton":
        from streamserve_kernels.triton.tuning import tune

        started = monotonic()
        rows = {key.num_tokens for key in ladder.graphs()}
        chosen = tune(model.linears(), sorted(rows))
        logger.info(
            "%d products have their kernels after %.1f s", len(chosen), monotonic() - started
        )


def assemble(
    model: DeviceModel,
    kv_caches: KVCache,
    ladder: StepLadder,
    *,
    vocab_size: int,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    transfer: KVTransfer | None = None,
    state_caches: Sequence[Tensor] = (),
    keeps_hidden_states: bool = False,
    sampler: Callable[..., DeviceSampler] = DeviceSampler,
) -> tuple[CudaModelRunner, StepExecutor]:
    """A runner that has met nothing yet, and what runs its steps."""
    device, kernels = model.device, model.kernels
    timeline = timeline_of(device)
    batch = DeviceInputBatch(
        ladder,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        block_size=block_size,
        vocab_size=vocab_size,
        device=device,
        timeline=timeline,
        keeps_states=bool(state_caches),
    )
    sampling = load_sampling(kernels)
    last_tokens = torch.zeros(batch.unused_row + 1, dtype=torch.int64, device=device)
    max_rows = ladder.largest.num_seqs
    logits = torch.empty((max_rows, vocab_size), dtype=model.logits_dtype, device=device)
    executor = StepExecutor(
        model,
        kv_caches,
        batch.arena,
        sampling,
        last_tokens,
        logits,
        keeps_hidden_states=keeps_hidden_states,
    )
    draws = sampler(sampling, vocab_size, max_rows, device)
    runner = CudaModelRunner(
        kernels, kv_caches, batch, executor, draws, timeline, transfer, state_caches
    )
    return runner, executor


def _meet_shapes(executor: StepExecutor, ladder: StepLadder) -> int:
    """Runs steps of nothing but padding: every launch of a shape, whatever is in it."""
    keys = list(ladder.shapes())
    for key in keys:
        executor.run_eagerly(key)
    return len(keys)


def _capture_first(executor: StepExecutor, ladder: StepLadder) -> None:
    first = [key for key in ladder.decodes() if key.num_seqs <= _FIRST_DECODES]
    while executor.num_graphs < len(first) and executor.capture_next():
        pass
