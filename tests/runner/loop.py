"""The engine's step loop around a runner, driven by hand."""

from __future__ import annotations

from streamserve.config import CacheConfig, SchedulerConfig
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.plan import ModelRunner
from streamserve.core.request import Request
from streamserve.core.scheduler import Scheduler
from streamserve.runner.cuda.model_runner import CudaModelRunner
from tests.runner.tiny_llama import MAX_LEN

BLOCK_SIZE = 4
NUM_BLOCKS = 160


def forget(runner: ModelRunner, request_ids: list[str] | None = None) -> None:
    """Makes a runner forget these requests, or all of them."""
    if isinstance(runner, CudaModelRunner):
        batch, live = runner._batch, runner._batch.rows.request_ids
    else:
        batch, live = runner._input_batch, runner._input_batch.request_ids
    for request_id in live if request_ids is None else request_ids:
        batch._remove(request_id)


class Loop:
    """The engine's step loop, without its clock and its readers."""

    next_step_id = 0

    def __init__(
        self,
        runner,
        *,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        prefix=True,
        num_host_blocks=0,
        num_state_slots=0,
        propose=None,
        **config,
    ) -> None:
        self.runner = runner
        cache = CacheConfig(
            num_blocks=num_blocks,
            block_size=block_size,
            enable_prefix_caching=prefix,
            num_host_blocks=num_host_blocks,
            max_transfers_per_step=6,
            num_state_slots=num_state_slots,
        )
        options = {
            "max_model_len": MAX_LEN,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 48,
            "cascade_overhead_tokens": 0,  # whatever can be shared is
        }
        self.scheduler = Scheduler(
            SchedulerConfig(**{**options, **config}),
            KVCacheManager(cache),
            lambda: 0.0,
            propose=propose,
        )
        self.plans = []
        self.updates = []
        self.futures = []
        self.num_failed = 0

    def run(self, requests: list[Request]) -> list[list[int]]:
        for request in requests:
            self.scheduler.add(request)
        while self.scheduler.has_unfinished:
            self.turn()
        while self.futures:
            self.retire()
        self.scheduler.check_integrity()
        return [request.output_token_ids for request in requests]

    def retire(self) -> None:
        self.updates += self.scheduler.update(self.futures.pop(0).result(timeout=120))

    def turn(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.plans.append(plan)
            self.runner.launch(plan)
            self.futures.append(self.runner.sample(plan.step_id))
        if plan is None or len(self.futures) >= self.scheduler.config.max_steps_in_flight:
            self.retire()
        self.scheduler.check_integrity()
