"""One rank's runner on a GPU, and on the first rank that of all.

As `streamserve.runner.cuda.build`, but for two things: what every rank must do at the same time is
a command of the first one's, and graphs are all captured before the server is ready.
"""

from __future__ import annotations

from functools import partial

from streamserve.core.plan import ModelRunner
from streamserve.core.step_time import StepProfile
from streamserve.models import KVCache, LanguageModel
from streamserve.runner.cuda.build import assemble, launch_eagerly, meet_shapes, tune_linears
from streamserve.runner.cuda.step_key import StepLadder
from streamserve.runner.memory import MemoryPlan
from streamserve.runner.tensor_parallel.cuda_drawing import rank_sampler
from streamserve.runner.tensor_parallel.team import Team
from streamserve.runner.warm_up import GPU_MEASURING, WarmUp


def build_rank_runner(
    model: LanguageModel,
    memory: MemoryPlan,
    ladder: StepLadder,
    team: Team,
    *,
    max_num_batched_tokens: int,
    kv_caches: KVCache,
    enforce_eager: bool = False,
) -> tuple[ModelRunner, StepProfile]:
    """See `build_cuda_runner`; every rank calls it, and only the first one's returns."""
    launch_eagerly()
    tune_linears(model, ladder)
    own, executor = assemble(
        model.one_of_each_layer(),
        kv_caches,
        ladder,
        vocab_size=model.spec.vocab_size,
        block_size=memory.block_size,
        max_model_len=memory.max_model_len,
        max_num_seqs=memory.max_num_seqs,
        sampler=partial(rank_sampler, team.ranks),
    )

    def use_whole_model() -> None:
        # Behind the steps that are queued: another rank's may not have been launched yet.
        own.on_device_thread(lambda: setattr(executor, "model", model))

    def capture() -> None:
        executor.want_graphs(ladder.graphs())
        own.capture_graphs()

    own.on_device_thread(lambda: meet_shapes(executor, ladder))
    runner = team.steer(own, {"whole model": use_whole_model, "graphs": capture})
    try:
        warm_up = WarmUp(runner, memory, max_num_batched_tokens, GPU_MEASURING)
        warm_up.run_ragged()
        warm_up.run_sampler()
        runner.call("whole model")
        warm_up.run_full_steps()
        if not enforce_eager and model.device.type == "cuda":
            runner.call("graphs")
        return runner, warm_up.measure()
    except BaseException:
        runner.close()
        raise
