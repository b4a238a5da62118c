"""From flags to frozen configs to the objects of an engine: the one place that knows every part."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

import streamserve_kernels
from streamserve.cli.args import model_name
from streamserve.config import CacheConfig, SchedulerConfig
from streamserve.core.clock import monotonic
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.scheduler import Scheduler
from streamserve.core.step_time import StepTimeModel
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.tokenizer import FastTokenizer
from streamserve.errors import ConfigError
from streamserve.models import (
    ModelConfig,
    kv_bytes_per_block,
    load_config,
    load_model,
    resolve_dtype,
    resolve_model,
    touch_kv_cache,
)
from streamserve.runner.available import available_cpu_memory
from streamserve.runner.build import build_runner, new_kv_cache, step_buffer_bytes
from streamserve.runner.memory import MemoryPlan, format_bytes, parse_bytes, plan_memory
from streamserve.runner.passing_thread import in_background, on_passing_thread

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Service:
    """An engine that is ready to start, and what a front needs beside it."""

    engine: AsyncEngine
    tokenizer: FastTokenizer
    chat_template: ChatTemplate
    model_name: str
    sampling_defaults: Mapping[str, float]
    max_model_len: int


class Progress:
    """Says how far the weights are, at most once a second, and only if it takes that long."""

    def __init__(self, say: Say, interval_s: float = 1.0) -> None:
        self._say = say
        self._interval_s = interval_s
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes are loaded."""
        now = time.monotonic()
        if now - self._last >= self._interval_s and total:
            self._last = now
            self._say(f"loading weights: {100 * done // total}% of {format_bytes(total)}")


def box_path() -> Path:
    """The directory of the model in the box."""
    return Path(str(files("streamserve") / "assets" / "box"))


def build_service(args: Namespace, *, say: Say, warn: Say) -> Service:
    """Load the model and build the engine around it; minutes for a big one. Main thread.

    Says what it does line by line. Raises ``StreamServeError``.
    """
    device = torch.device("cpu")
    if args.quantization == "fp8" and device.type == "cpu":
        raise ConfigError("--quantization fp8 needs a GPU; a CPU has int8 and int4")
    path = box_path() if args.model is None else _resolve(args, say)
    config = load_config(path)
    dtype = resolve_dtype(args.dtype, config, device)
    max_model_len = config.resolve_max_model_len(args.max_model_len)
    name = model_name(args)
    quantised = f" with {args.quantization} weights" if args.quantization else ""
    dtype_name = str(dtype).removeprefix("torch.")
    say(f"model {name}: {config.architecture}, {dtype_name}{quantised}, on {device}")

    scheduler_config = SchedulerConfig(
        max_model_len=max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_waiting=args.max_num_waiting,
        policy=args.scheduling_policy,
        max_steps_in_flight=2 if args.async_scheduling else 1,
        enable_cascade_attention=not args.disable_cascade_attn,
        itl_target_ms=args.itl_target_ms,
    )
    memory = _plan(args, config, dtype, scheduler_config)
    for line in memory.describe().splitlines():
        say(f"  {line}")
    kernels = streamserve_kernels.load(
        device, dtype=dtype, head_sizes=config.spec.head_sizes(), block_size=memory.block_size
    )
    say(f"  kernels       {kernels.name}")
    # A virtual machine may take seconds to get gigabytes from its host; nobody waits for that.
    kv_caches = new_kv_cache(config.spec, memory, dtype, device, kernels)
    in_background(lambda: touch_kv_cache(kv_caches))
    tokenizer, template = _build_text(args, path)
    if template.is_builtin:
        warn(f"the checkpoint has no chat template: using the {template.source} one")

    if args.quantization is not None and (reason := kernels.slow_quantisation()) is not None:
        warn(f"--quantization {args.quantization} will be slow: {reason}")
    model = on_passing_thread(
        lambda: load_model(
            path,
            dtype=dtype,
            device=device,
            kernels=kernels,
            load_format=args.load_format,
            max_model_len=max_model_len,
            progress=Progress(say),
            quantization=args.quantization,
        )
    )
    runner, profile = build_runner(
        model,
        memory,
        max_num_batched_tokens=scheduler_config.max_num_batched_tokens,
        kv_caches=kv_caches,
    )
    cache = CacheConfig(
        num_blocks=memory.num_blocks,
        block_size=memory.block_size,
        enable_prefix_caching=args.enable_prefix_caching,
    )
    engine = AsyncEngine(
        scheduler=Scheduler(
            scheduler_config, KVCacheManager(cache), monotonic, StepTimeModel(profile)
        ),
        runner=runner,
        tokenizer=tokenizer,
        eos_token_ids=frozenset(config.eos_token_ids),
        max_model_len=max_model_len,
        vocab_size=config.vocab_size,
    )
    return Service(engine, tokenizer, template, name, config.sampling_defaults, max_model_len)


def _resolve(args: Namespace, say: Say) -> Path:
    if not Path(args.model).expanduser().is_dir():
        say(f"looking for {args.model} on the hub")
    return resolve_model(args.model, revision=args.revision, load_format=args.load_format)


def _plan(
    args: Namespace, config: ModelConfig, dtype: torch.dtype, scheduler: SchedulerConfig
) -> MemoryPlan:
    return plan_memory(
        available=available_cpu_memory(),
        weight_bytes=config.weight_bytes(dtype, args.quantization),
        step_buffer_bytes=step_buffer_bytes(
            config.spec, dtype, scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        ),
        kv_bytes_per_block=kv_bytes_per_block(config.spec, args.block_size, dtype),
        block_size=args.block_size,
        max_model_len=scheduler.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        kv_cache_memory=None if args.kv_cache_memory is None else parse_bytes(args.kv_cache_memory),
    )


def _build_text(args: Namespace, path: Path) -> tuple[FastTokenizer, ChatTemplate]:
    tokenizer_path = path if args.tokenizer is None else Path(args.tokenizer)
    tokenizer = FastTokenizer.from_directory(tokenizer_path)
    template = ChatTemplate.from_directory(
        tokenizer_path,
        override=args.chat_template,
        special_tokens=tokenizer.special_tokens,
        has_token=lambda token: tokenizer.token_to_id(token) is not None,
    )
    return tokenizer, template
