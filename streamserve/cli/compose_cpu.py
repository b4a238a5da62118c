"""On a CPU the memory is planned first: a model that does not fit is refused before it is read."""

from __future__ import annotations

from dataclasses import replace

from streamserve.cli.model_setup import BuiltModel, ModelSetup
from streamserve.models import (
    NativeConfig,
    adapter_bytes,
    kv_bytes_per_block,
    touch_kv_cache,
)
from streamserve.runner.available import available_cpu_memory
from streamserve.runner.build import build_runner, new_kv_cache, step_buffer_bytes
from streamserve.runner.memory import MemoryPlan, parse_bytes, plan_memory
from streamserve.runner.passing_thread import in_background, on_passing_thread
from streamserve.runner.tensor_parallel.team import agreed


class CpuBuilder:
    """Plans and allocates at once; the system provides the cache's pages in the background."""

    def __init__(self, setup: ModelSetup) -> None:
        self._setup = setup
        self._memory = agreed(_plan(setup), setup.team)
        setup.say_plan(self._memory)
        self._kernels = setup.choose_kernels()
        # A virtual machine may take seconds to get gigabytes from its host; nobody waits for that.
        kv_caches = new_kv_cache(
            setup.config.spec, self._memory, setup.dtype, setup.device, self._kernels
        )
        in_background(lambda is_exiting: touch_kv_cache(kv_caches, is_exiting))
        self._kv_caches = kv_caches

    def build(self) -> BuiltModel:
        """As in `ModelBuilder`."""
        model = on_passing_thread(lambda: self._setup.load(self._kernels))
        # jinja2's errors keep whoever has called it, a builder too, until garbage is collected.
        kv_caches, self._kv_caches = self._kv_caches, []
        runner, profile = build_runner(
            model,
            self._memory,
            max_num_batched_tokens=self._setup.scheduler.max_num_batched_tokens,
            kv_caches=kv_caches,
            max_num_sampled=self._setup.scheduler.max_num_sampled,
            team=self._setup.team,
        )
        return BuiltModel(
            runner,
            profile,
            self._memory,
            adapters=model.adapters,
        )


def _plan(setup: ModelSetup) -> MemoryPlan:
    args, config, scheduler = setup.args, setup.config, setup.scheduler
    weight_bytes = config.weight_bytes(setup.dtype, setup.quantization)
    if (adapters := setup.adapters) is not None:
        assert isinstance(config, NativeConfig), "others were refused"
        weight_bytes += adapter_bytes(
            config.spec, setup.dtype, adapters.num_adapters, adapters.max_rank
        )
    # The ranks of a model share the host's memory.
    available = available_cpu_memory()
    share = replace(available, num_bytes=available.num_bytes // args.tensor_parallel_size)
    return plan_memory(
        available=share,
        weight_bytes=weight_bytes,
        step_buffer_bytes=step_buffer_bytes(
            config.spec, setup.dtype, scheduler.max_num_batched_tokens, scheduler.max_num_sampled
        ),
        kv_bytes_per_block=kv_bytes_per_block(config.spec, args.block_size, setup.dtype),
        block_size=args.block_size,
        max_model_len=scheduler.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        kv_cache_memory=None if args.kv_cache_memory is None else parse_bytes(args.kv_cache_memory),
    )
