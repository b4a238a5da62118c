"""On a CPU the memory is planned first: a model that does not fit is refused before it is read."""

from __future__ import annotations

from dataclasses import replace

from streamserve.cli.model_setup import BuiltModel, HeadSetup, ModelSetup
from streamserve.core.plan import ModelRunner
from streamserve.models import (
    Decoder,
    KVCache,
    LanguageModel,
    NativeConfig,
    adapter_bytes,
    kv_bytes_per_block,
    state_bytes,
    touch_kv_cache,
)
from streamserve.models.model_shape import ModelShape
from streamserve.runner.available import available_cpu_memory
from streamserve.runner.build import (
    build_runner,
    head_buffer_bytes,
    new_kv_cache,
    step_buffer_bytes,
)
from streamserve.runner.drafting import DraftingRunner
from streamserve.runner.head_drafter import draft_with_head
from streamserve.runner.head_steps import HostHeadSteps
from streamserve.runner.memory import MemoryPlan, parse_bytes, plan_memory
from streamserve.runner.model_drafter import ModelDrafter
from streamserve.runner.model_runner import TorchModelRunner
from streamserve.runner.passing_thread import in_background, on_passing_thread
from streamserve.runner.tensor_parallel.team import agreed
from streamserve.runner.warm_up import closed_on_error
from streamserve_kernels import Kernels


class CpuBuilder:
    """Plans and allocates at once; the system provides the cache's pages in the background."""

    def __init__(self, setup: ModelSetup) -> None:
        self._setup = setup
        self._memory = agreed(_plan(setup), setup.team)
        setup.say_plan(self._memory)
        self._kernels = setup.choose_kernels()
        self._kv_caches = _new_kv_cache(setup.config.spec, setup, self._memory, self._kernels)
        self._draft: _DraftBuilder | _HeadBuilder | None = None
        if setup.draft is not None:
            self._draft = _DraftBuilder(setup.draft, self._memory)
        elif setup.head is not None:
            self._draft = _HeadBuilder(setup, setup.head, self._memory, self._kernels)

    def build(self) -> BuiltModel:
        """As in `ModelBuilder`."""
        model = on_passing_thread(lambda: self._setup.load(self._kernels))
        # jinja2's errors keep whoever has called it, a builder too, until garbage is collected.
        kv_caches, self._kv_caches = self._kv_caches, []
        head = self._setup.head
        if head is not None:
            assert isinstance(model, Decoder), "others have no heads"
            model.tap(head.taps)
        runner, profile = build_runner(
            model,
            self._memory,
            max_num_batched_tokens=self._setup.scheduler.max_num_batched_tokens,
            kv_caches=kv_caches,
            max_num_sampled=self._setup.scheduler.max_num_sampled,
            keeps_hidden_states=head is not None,
            team=self._setup.team,
        )
        if self._draft is not None:
            with closed_on_error(runner):
                runner = self._draft.build(runner, model)
        return BuiltModel(
            runner,
            profile,
            self._memory,
            adapters=model.adapters,
        )


class _DraftBuilder:
    """Of a model that drafts, in as many blocks as the other has."""

    def __init__(self, setup: ModelSetup, memory: MemoryPlan) -> None:
        self._setup = setup
        self._memory = memory
        self._kernels = setup.choose_kernels()
        self._kv_caches = _new_kv_cache(setup.config.spec, setup, memory, self._kernels)

    def build(self, runner: ModelRunner, target: LanguageModel) -> ModelRunner:
        """The runner of both models."""
        assert isinstance(runner, TorchModelRunner)
        model = on_passing_thread(lambda: self._setup.load(self._kernels))
        kv_caches, self._kv_caches = self._kv_caches, []
        max_num_batched_tokens = self._setup.scheduler.max_num_batched_tokens
        draft, _ = build_runner(
            model,
            self._memory,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_caches=kv_caches,
        )
        drafter = ModelDrafter(
            draft,
            block_size=self._memory.block_size,
            vocab_size=min(target.spec.vocab_size, model.spec.vocab_size),
            max_num_batched_tokens=max_num_batched_tokens,
        )
        return DraftingRunner(runner, drafter)


class _HeadBuilder:
    """Of a head that drafts from hidden states, in as many blocks as its target has."""

    def __init__(
        self, setup: ModelSetup, head: HeadSetup, memory: MemoryPlan, kernels: Kernels
    ) -> None:
        self._setup = setup
        self._head = head
        self._memory = memory
        self._kv_caches = _new_kv_cache(head.spec, setup, memory, kernels)

    def build(self, runner: ModelRunner, target: LanguageModel) -> ModelRunner:
        """The runner of both, warm."""
        assert isinstance(runner, TorchModelRunner)
        assert isinstance(target, Decoder)
        head = on_passing_thread(lambda: self._head.load(target))
        on_passing_thread(lambda: head.warm_up(self._memory.block_size))
        kv_caches, self._kv_caches = self._kv_caches, []
        scheduler = self._setup.scheduler
        head.record(
            kv_caches,
            max_tokens=scheduler.max_num_batched_tokens,
            max_logits=self._memory.max_num_seqs,
        )
        steps = HostHeadSteps(
            head,
            kv_caches,
            block_size=self._memory.block_size,
            max_model_len=self._memory.max_model_len,
            max_num_seqs=self._memory.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
        )
        return draft_with_head(runner, steps, self._memory, scheduler.max_num_batched_tokens)


def _new_kv_cache(
    spec: ModelShape, setup: ModelSetup, memory: MemoryPlan, kernels: Kernels
) -> KVCache:
    kv_caches = new_kv_cache(spec, memory, setup.dtype, setup.device, kernels)
    # A virtual machine may take seconds to get gigabytes from its host; nobody waits for that.
    in_background(lambda is_exiting: touch_kv_cache(kv_caches, is_exiting))
    return kv_caches


def _plan(setup: ModelSetup) -> MemoryPlan:
    args, scheduler = setup.args, setup.scheduler
    weight_bytes, buffer_bytes, block_bytes = _sizes(setup)
    if setup.draft is not None:
        of_draft = _sizes(setup.draft)
        weight_bytes += of_draft[0]
        buffer_bytes += of_draft[1]
        block_bytes += of_draft[2]
    if (head := setup.head) is not None:
        weight_bytes += head.weight_bytes
        buffer_bytes += head_buffer_bytes(
            head.spec, setup.dtype, scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        )
        block_bytes += kv_bytes_per_block(head.spec, args.block_size, setup.dtype)
    speculative = scheduler.speculative
    # The ranks of a model share the host's memory.
    available = available_cpu_memory()
    share = replace(available, num_bytes=available.num_bytes // args.tensor_parallel_size)
    return plan_memory(
        available=share,
        weight_bytes=weight_bytes,
        step_buffer_bytes=buffer_bytes,
        kv_bytes_per_block=block_bytes,
        block_size=args.block_size,
        max_model_len=scheduler.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        kv_cache_memory=None if args.kv_cache_memory is None else parse_bytes(args.kv_cache_memory),
        state_bytes=state_bytes(setup.config.spec, setup.dtype),
        num_drafts=0 if speculative is None else speculative.num_speculative_tokens,
    )


def _sizes(setup: ModelSetup) -> tuple[int, int, int]:
    """Bytes of a model's weights, of its step buffers, and of a block of its KV cache."""
    config, scheduler = setup.config, setup.scheduler
    weight_bytes = config.weight_bytes(setup.dtype, setup.quantization)
    if (adapters := setup.adapters) is not None:
        assert isinstance(config, NativeConfig), "others were refused"
        weight_bytes += adapter_bytes(
            config.spec, setup.dtype, adapters.num_adapters, adapters.max_rank
        )
    buffer_bytes = step_buffer_bytes(
        config.spec, setup.dtype, scheduler.max_num_batched_tokens, scheduler.max_num_sampled
    )
    block_bytes = kv_bytes_per_block(config.spec, setup.args.block_size, setup.dtype)
    return weight_bytes, buffer_bytes, block_bytes
