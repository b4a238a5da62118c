"""From flags to frozen configs to the objects of an engine: the one place that knows every part."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from streamserve.cli.args import model_name, scheduling_policy
from streamserve.cli.device_flags import (
    refuse_beside_states,
    refuse_undivided,
    resolve_device_flags,
)
from streamserve.cli.draft_head import with_draft_head
from streamserve.cli.draft_model import check_vocabulary, with_draft_model
from streamserve.cli.lora_flags import adapter_config
from streamserve.cli.model_setup import BuiltModel, ModelBuilder, ModelSetup, Say
from streamserve.cli.model_source import (
    model_directory,
    sampling_defaults,
    tokenizer_directory,
)
from streamserve.cli.quantization import agreed_quantization
from streamserve.cli.ranks import LeadingTeam
from streamserve.cli.speculative import speculative_config
from streamserve.config import CacheConfig, EmbeddingConfig, SchedulerConfig
from streamserve.core.clock import monotonic
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.plan import ModelRunner
from streamserve.core.scheduler import Scheduler
from streamserve.core.step_time import StepTimeModel
from streamserve.engine.adapters import Adapters
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.grammar import Grammars
from streamserve.engine.preprocess import PromptEncoder
from streamserve.engine.system_prefix import system_prefix
from streamserve.engine.text_source import TextSource
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import ConfigError, InvalidParameterError
from streamserve.models import (
    ModelConfig,
    NativeConfig,
    load_config,
    read_embedding_config,
    read_text_files,
    resolve_dtype,
    state_bytes,
    tokenizer_backend,
)
from streamserve.models.tensor_parallel.config import share_config
from streamserve.runner.devices import choose_device, device_of_rank, visible_gpus
from streamserve.runner.memory import MemoryPlan
from streamserve.runner.passing_thread import in_background
from streamserve.runner.warm_up import closed_on_error


@dataclass(frozen=True, slots=True)
class Service:
    """An engine that is ready to start, and what a front needs beside it."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    tokenizer_path: Path
    chat_template: ChatTemplate
    model_name: str
    sampling_defaults: Mapping[str, Any]
    embedding: EmbeddingConfig
    max_model_len: int
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    memory: MemoryPlan
    finish_warm_up: Callable[[], None]
    text_source: TextSource
    adapters: Adapters | None = None


def build_service(
    args: Namespace,
    *,
    say: Say,
    warn: Say,
    observed: Callable[[ModelRunner], ModelRunner] = lambda runner: runner,
    on_template: Callable[[ChatTemplate], None] = lambda template: None,
) -> Service:
    """Load the model and build the engine around it; minutes for a big one. Main thread.

    The engine runs its steps on ``observed(runner)``: a bench looks on. ``on_template`` is called
    before the weights are read, and may refuse. Says what it does line by line. Raises
    ``StreamServeError``.
    """
    with all_ranks(set_up(args, say, warn)) as setup:
        return _build(args, setup, observed, on_template)


def _build(
    args: Namespace,
    setup: ModelSetup,
    observed: Callable[[ModelRunner], ModelRunner],
    on_template: Callable[[ChatTemplate], None],
) -> Service:
    say, warn = setup.say, setup.warn
    builder = builder_of(setup)
    defaults = sampling_defaults(args, setup.config)
    hidden_size = setup.config.spec.hidden_size
    embedding = read_embedding_config(setup.path, hidden_size, pooling=args.pooling)
    tokenizer_path = tokenizer_directory(args, setup.path, say)
    text_from = text_source(args, tokenizer_path)
    tokenizer, template = text_from()
    if setup.draft is not None:
        check_vocabulary(tokenizer, text_source(args, setup.draft.path))
    if template.is_builtin:
        warn(f"the checkpoint has no chat template: using the {template.source} one")
    on_template(template)
    public_prefixes = _public_prefixes(args, tokenizer, template)
    eos_token_ids = _eos_token_ids(setup.config, tokenizer)
    grammars = Grammars(tokenizer, eos_token_ids, setup.config.vocab_size)
    in_background(lambda _: grammars.warm())  # it would stop every stream for a moment later
    built = builder.build()
    with closed_on_error(built.runner):
        adapters = _load_adapters(setup, built)
    cache = CacheConfig(
        num_blocks=built.memory.num_blocks,
        block_size=built.memory.block_size,
        enable_prefix_caching=args.enable_prefix_caching,
        num_host_blocks=built.num_host_blocks,
        max_transfers_per_step=built.max_transfers_per_step,
        num_state_slots=built.memory.num_state_slots,
    )
    config, scheduler = setup.config, setup.scheduler
    engine = AsyncEngine(
        scheduler=Scheduler(
            scheduler,
            KVCacheManager(cache, public_prefixes=public_prefixes),
            monotonic,
            StepTimeModel(built.profile),
        ),
        runner=observed(built.runner),
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        max_model_len=scheduler.max_model_len,
        vocab_size=config.vocab_size,
        grammars=grammars,
        seed=args.seed,
    )
    if adapters is not None:
        adapters.serve(engine.uses_adapter)
    return Service(
        engine,
        tokenizer,
        tokenizer_path,
        template,
        model_name(args),
        defaults,
        embedding,
        scheduler.max_model_len,
        config,
        setup.dtype,
        setup.device,
        built.memory,
        built.finish_warm_up,
        text_from,
        adapters,
    )


def _load_adapters(setup: ModelSetup, built: BuiltModel) -> Adapters | None:
    if setup.adapters is None:
        return None
    assert built.adapters is not None
    adapters = Adapters(built.adapters)
    for name, path in setup.adapters.modules:
        adapters.load_now(name, path)
        setup.say(f"adapter {name}: {path}")
    return adapters


@contextmanager
def all_ranks(setup: ModelSetup) -> Iterator[ModelSetup]:
    """The setup with the other ranks, which have started; they end if what is within raises."""
    if setup.args.tensor_parallel_size == 1:
        yield setup
        return
    setup.say(f"  ranks         {setup.args.tensor_parallel_size} processes, each with its share")
    team = LeadingTeam(setup.args, setup.path, setup.device)
    num_threads = torch.get_num_threads()
    try:
        if setup.device.type == "cpu":
            torch.set_num_threads(team.num_threads)
        yield replace(setup, team=team)
    except BaseException as error:
        team.abandon(error)
        raise
    finally:
        # Of this thread and of later ones: the device thread, which has run steps, keeps its own.
        torch.set_num_threads(num_threads)


def set_up(args: Namespace, say: Say, warn: Say, *, rank: int = 0) -> ModelSetup:
    """Everything that can be known, or refused, before the model is read.

    Of one of ``--tensor-parallel-size`` ranks; the first one serves.
    """
    size = args.tensor_parallel_size
    cpu = torch.device("cpu")
    device = cpu if args.device == "cpu" else choose_device(args.device, visible_gpus())
    if device != cpu and size > 1:
        device = device_of_rank(device, rank, size, visible_gpus())
    args = resolve_device_flags(args, on_gpu=device != cpu, warn=warn)
    if args.chat_template is not None:
        ChatTemplate.given(args.chat_template)
    path = model_directory(args, say)
    config = load_config(
        path,
        model_impl=args.model_impl,
        trust_remote_code=args.trust_remote_code,
        hf_overrides=args.hf_overrides,
    )
    if state_bytes(config.spec, torch.float32):
        refuse_beside_states(args, on_gpu=device != cpu)
    if size > 1:
        config = share_config(config, rank, size)
    stored = None if config.stored_quantization is None else config.stored_quantization.name
    if stored is not None and args.load_format == "dummy":
        raise ConfigError(f"--load-format dummy draws plain weights, and {path} says {stored}")
    quantization = agreed_quantization(args.quantization, stored)
    adapters = adapter_config(args)
    refuse_undivided(args, with_adapters=adapters is not None)
    if adapters is not None and not isinstance(config, NativeConfig):
        raise ConfigError(
            f"--enable-lora: adapters are for the families with a decoder of ours, "
            f"not for {config.architecture}"
        )
    dtype = resolve_dtype(args.dtype, config, device)
    max_model_len = config.resolve_max_model_len(args.max_model_len)
    method = stored or quantization
    quantised = f" with {method} weights" if method else ""
    dtype_name = str(dtype).removeprefix("torch.")
    say(f"model {model_name(args)}: {config.architecture}, {dtype_name}{quantised}, on {device}")
    if config.unserved:
        say(f"  text only     requests with {config.unserved} are refused")
    setup = ModelSetup(
        args=args,
        path=path,
        config=config,
        dtype=dtype,
        device=device,
        scheduler=_scheduler_config(args, max_model_len),
        quantization=quantization,
        adapters=adapters,
        say=say,
        warn=warn,
    )
    return with_draft_head(with_draft_model(setup))


def _scheduler_config(args: Namespace, max_model_len: int) -> SchedulerConfig:
    return SchedulerConfig(
        max_model_len=max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_waiting=args.max_num_waiting,
        max_num_waiting_tokens=args.max_num_queued_tokens,
        policy=scheduling_policy(args),
        max_steps_in_flight=2 if args.async_scheduling else 1,
        enable_cascade_attention=not args.disable_cascade_attn,
        itl_target_ms=args.itl_target_ms,
        speculative=speculative_config(args),
    )


def builder_of(setup: ModelSetup) -> ModelBuilder:
    """What builds the model and its runner on the setup's device."""
    # Each brings its device's kernels and runner along: the other's are not even imported.
    if setup.device.type == "cpu":
        from streamserve.cli.compose_cpu import CpuBuilder

        return CpuBuilder(setup)
    from streamserve.cli.compose_cuda import CudaBuilder

    return CudaBuilder(setup)


def _public_prefixes(
    args: Namespace, tokenizer: Tokenizer, template: ChatTemplate
) -> list[list[int]]:
    encoder = PromptEncoder(tokenizer, template)
    prefixes: list[list[int]] = []
    for file in getattr(args, "shared_system_prompt", None) or ():
        try:
            text = Path(file).read_text(encoding="utf-8").rstrip("\n")
            prefixes.append(system_prefix(encoder, text))
        except (OSError, ValueError, InvalidParameterError) as error:
            raise ConfigError(f"--shared-system-prompt {file} cannot be used: {error}") from error
    return prefixes


def _eos_token_ids(config: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
    ends = (tokenizer.token_to_id(token) for token in config.end_tokens)
    return frozenset(config.eos_token_ids).union(end for end in ends if end is not None)


def text_source(args: Namespace, path: Path) -> TextSource:
    """Where the tokenizer and the template come from, as the flags say. Raises ``ConfigError``."""
    backend = None
    is_slow = args.tokenizer_mode == "slow"
    if is_slow and path.is_file():
        raise ConfigError(
            f"--tokenizer-mode slow: {path} holds a vocabulary, of which there is no tokenizer in "
            "Python; auto makes one of it"
        )
    files = read_text_files(path) if path.is_file() else None
    if is_slow or (files is None and not (path / "tokenizer.json").is_file()):
        # Worker processes then import transformers as well.
        backend = partial(
            tokenizer_backend, path, trust_remote_code=args.trust_remote_code, slow=is_slow
        )
    return TextSource(
        path,
        args.chat_template,
        backend,
        trusts_requests=getattr(args, "trust_request_chat_template", False),
        trusts_messages=getattr(args, "trust_message_special_tokens", False),
        files=files,
    )
