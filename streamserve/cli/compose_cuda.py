"""On a GPU the memory is measured: weights, one largest step, and the rest is the KV cache's."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from streamserve.cli.model_setup import BuiltModel, ModelSetup
from streamserve.errors import ConfigError, KVCacheMemoryError, OutOfMemoryError
from streamserve.models import (
    Decoder,
    DraftHead,
    KVCache,
    LanguageModel,
    kv_bytes_per_block,
    state_bytes,
)
from streamserve.models.model_shape import ModelShape
from streamserve.runner.available import available_cpu_memory
from streamserve.runner.build import head_buffer_bytes, new_kv_cache
from streamserve.runner.cuda.build import build_cuda_runner, draft_with_device_head
from streamserve.runner.cuda.memory import (
    free_spare,
    free_work_spaces,
    hidden_states_bytes,
    plan_gpu_memory,
    profile_step_bytes,
    read_gpu,
)
from streamserve.runner.cuda.model_runner import CudaModelRunner
from streamserve.runner.cuda.step_key import StepLadder
from streamserve.runner.kv_transfer import KVTransfer
from streamserve.runner.memory import MemoryPlan, format_bytes, parse_bytes, plan_host_blocks
from streamserve.runner.tensor_parallel.team import agreed
from streamserve.runner.warm_up import closed_on_error

# The first with conversions from and to 8-bit floats: Ada.
_FP8_CAPABILITY = (8, 9)


class CudaBuilder:
    """Everything happens in `build`; making one refuses what cannot be."""

    def __init__(self, setup: ModelSetup) -> None:
        torch.cuda.set_device(setup.device)
        self._setup = setup
        self._kv_cache_memory = (
            None if setup.args.kv_cache_memory is None else parse_bytes(setup.args.kv_cache_memory)
        )
        self._kv_dtype = _kv_dtype(setup)
        specs = [setup.config.spec] if setup.head is None else [setup.config.spec, setup.head.spec]
        self._block_bytes = sum(
            kv_bytes_per_block(spec, setup.args.block_size, self._kv_dtype) for spec in specs
        )
        self._num_host_blocks = self._plan_host_blocks()
        self._kernels = setup.choose_kernels()
        speculative = setup.scheduler.speculative
        self._ladder = StepLadder(
            setup.scheduler.max_num_batched_tokens,
            setup.scheduler.max_num_seqs,
            decode_sizes=setup.args.cuda_graph_sizes,
            with_groups=setup.scheduler.enable_cascade_attention,
            num_adapters=0 if setup.adapters is None else setup.adapters.num_adapters,
            num_drafts=0 if speculative is None else speculative.num_speculative_tokens,
            max_num_sampled=setup.scheduler.max_num_sampled,
        )

    def build(self) -> BuiltModel:
        """As in `ModelBuilder`."""
        setup = self._setup
        with _RoomFor("the weights", setup, "a smaller model or dtype is needed"):
            model = setup.load(self._kernels)
            head = self._load_head(model)
        with _RoomFor("the largest step", setup, "lower --max-num-batched-tokens"):
            memory = agreed(self._plan(model), setup.team)
        setup.say_plan(memory)
        if self._num_host_blocks:
            host_bytes = format_bytes(self._num_host_blocks * self._block_bytes)
            setup.say(f"  host blocks   {self._num_host_blocks:,}, {host_bytes}")
        room = _RoomFor("the KV cache", setup, "lower --gpu-memory-utilization")
        with room, ExitStack() as on_error:
            kv_caches = self._new_kv_cache(model.spec, memory)
            caches_of_head = None if head is None else self._new_kv_cache(head.spec, memory)
            transfer = None
            if self._num_host_blocks:
                transfer = KVTransfer(kv_caches, self._num_host_blocks)
                on_error.enter_context(closed_on_error(transfer))
            runner, profile = build_cuda_runner(
                model,
                memory,
                self._ladder,
                max_num_batched_tokens=setup.scheduler.max_num_batched_tokens,
                kv_caches=kv_caches,
                enforce_eager=setup.args.enforce_eager,
                transfer=transfer,
                keeps_hidden_states=head is not None,
                team=setup.team,
            )
            on_error.enter_context(closed_on_error(runner))
            if not isinstance(runner, CudaModelRunner):  # but that of all ranks
                return BuiltModel(runner, profile, memory)
            built = BuiltModel(
                runner,
                profile,
                memory,
                adapters=model.adapters,
                finish_warm_up=runner.capture_graphs,
            )
            if head is not None and caches_of_head is not None:
                drafting = draft_with_device_head(
                    runner,
                    head,
                    caches_of_head,
                    memory,
                    max_num_batched_tokens=setup.scheduler.max_num_batched_tokens,
                    enforce_eager=setup.args.enforce_eager,
                )
                on_error.enter_context(closed_on_error(drafting))
                built = replace(built, runner=drafting)
            if transfer is None:
                return built
            per_step = runner.on_device_thread(transfer.blocks_per_step)
            return replace(
                built, num_host_blocks=transfer.num_host_blocks, max_transfers_per_step=per_step
            )

    def _load_head(self, model: LanguageModel) -> DraftHead | None:
        if (head := self._setup.head) is None:
            return None
        assert isinstance(model, Decoder), "others have no heads"
        model.tap(head.taps)
        return head.load(model)

    def _new_kv_cache(self, spec: ModelShape, memory: MemoryPlan) -> KVCache:
        setup = self._setup
        return new_kv_cache(spec, memory, self._kv_dtype, setup.device, self._kernels, setup.dtype)

    def _plan_host_blocks(self) -> int:
        swap_space = self._setup.args.swap_space
        if swap_space is None:
            return 0
        return plan_host_blocks(parse_bytes(swap_space), self._block_bytes, available_cpu_memory())

    def _plan(self, model: LanguageModel) -> MemoryPlan:
        setup, args, scheduler = self._setup, self._setup.args, self._setup.scheduler
        graphs = [] if args.enforce_eager else list(self._ladder.graphs())
        speculative = scheduler.speculative
        step = profile_step_bytes(
            model,
            ladder=self._ladder,
            graphs=graphs,
            max_model_len=scheduler.max_model_len,
            block_size=args.block_size,
            kv_dtype=self._kv_dtype,
        )
        step_bytes = step.reserve(
            max_num_sampled=scheduler.max_num_sampled,
            logits_row_bytes=model.spec.vocab_size * torch.float32.itemsize,
            graphs=graphs,
        )
        if self._num_host_blocks:
            step_bytes += KVTransfer.device_bytes(self._block_bytes)
        if (head := setup.head) is not None:
            step_bytes += head_buffer_bytes(
                head.spec, setup.dtype, scheduler.max_num_batched_tokens, scheduler.max_num_seqs
            )
            step_bytes += hidden_states_bytes(
                model.spec.hidden_size * max(len(head.taps), 1),
                setup.dtype,
                scheduler.max_num_batched_tokens,
            )
        return plan_gpu_memory(
            read_gpu(setup.device),
            name=str(setup.device),
            utilization=args.gpu_memory_utilization,
            step_bytes=step_bytes,
            kv_bytes_per_block=self._block_bytes,
            block_size=args.block_size,
            max_model_len=scheduler.max_model_len,
            max_num_seqs=scheduler.max_num_seqs,
            kv_cache_memory=self._kv_cache_memory,
            state_bytes=state_bytes(model.spec, setup.dtype),
            num_drafts=0 if speculative is None else speculative.num_speculative_tokens,
        )


def _kv_dtype(setup: ModelSetup) -> torch.dtype:
    if setup.args.kv_cache_dtype == "auto":
        return setup.dtype
    capability = torch.cuda.get_device_capability(setup.device)
    if capability < _FP8_CAPABILITY:
        raise ConfigError(
            "--kv-cache-dtype fp8 must have a GPU of compute capability 8.9 or more, "
            f"{setup.device} has {capability[0]}.{capability[1]}"
        )
    return torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class _RoomFor:
    """Makes a refusal of the error when there is no memory for ``what``: torch's, or a step's.

    (Since Python 3.12 what a generator makes another error of is kept by its own traceback.)
    """

    what: str
    setup: ModelSetup
    advice: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, (torch.OutOfMemoryError, OutOfMemoryError)):
            return
        free_work_spaces()
        free_spare(self.setup.device)
        free, total = torch.cuda.mem_get_info(self.setup.device)
        raise KVCacheMemoryError(
            f"{self.what} did not fit into {self.setup.device}: {format_bytes(free)} of "
            f"{format_bytes(total)} were left; {self.advice}, or free memory"
        ) from error
