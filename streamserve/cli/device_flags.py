"""Flags whose default, or whose effect, depends on the device: all of it in one place.

No torch here: which device it is, `streamserve.runner.devices` says.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass

from streamserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DeviceDefaults:
    """What a flag is where it was not given; the names are the flags'."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    gpu_memory_utilization: float | None


# A CPU computes 512 tokens in the time that a stream may pause; a GPU needs thousands to be busy,
# and reads longer blocks faster.
CPU_DEFAULTS = DeviceDefaults(64, 512, 16, None)
GPU_DEFAULTS = DeviceDefaults(256, 8192, 64, 0.9)

# Flags that only a GPU looks at, and what to say of them on a CPU.
_GPU_ONLY = {
    "gpu_memory_utilization": "; --kv-cache-memory sizes the cache",
    "enforce_eager": "",
    "cuda_graph_sizes": "",
    "swap_space": ": the KV cache is in host memory already; --kv-cache-memory makes it larger",
}


def default_text(name: str) -> str:
    """Both defaults of flag ``name``, for its help."""
    on_cpu, on_gpu = (getattr(defaults, name) for defaults in (CPU_DEFAULTS, GPU_DEFAULTS))
    return f"(default: {on_gpu} on a GPU, {on_cpu} on a CPU)"


def refuse_undivided(args: Namespace, *, with_adapters: bool) -> None:
    """Raises ConfigError for what is not built for a model that several devices share."""
    size = args.tensor_parallel_size
    given = {
        "--enable-lora": (with_adapters, "adapters are not divided"),
        "--swap-space": (args.swap_space is not None, "each device would keep blocks of its own"),
    }
    for flag, (is_given, why) in given.items():
        if is_given and size > 1:
            raise ConfigError(
                f"{flag} must not be given with --tensor-parallel-size above 1 ({why}), got {size}"
            )


def refuse_beside_states(args: Namespace, *, on_gpu: bool) -> None:
    """Raises ConfigError for what is not built for a model whose layers keep states."""
    size = args.tensor_parallel_size
    given = {
        "--swap-space": (
            args.swap_space is not None and on_gpu,
            "states are kept on the device only",
        ),
        "--tensor-parallel-size": (size > 1, "states are not divided"),
    }
    for flag, (is_given, why) in given.items():
        if is_given:
            raise ConfigError(
                f"{flag} must not be given for a model whose layers keep states: {why}"
            )


def resolve_device_flags(
    args: Namespace, *, on_gpu: bool, warn: Callable[[str], None]
) -> Namespace:
    """A copy of ``args`` with the device's defaults where nothing was given.

    Says what has no effect on this device. Raises ConfigError for what cannot be there.
    """
    if not on_gpu:
        for name, instead in _GPU_ONLY.items():
            if getattr(args, name) not in (None, False):
                warn(f"--{name.replace('_', '-')} has no effect on a CPU{instead}")
        if args.kv_cache_dtype != "auto":
            raise ConfigError(
                f"--kv-cache-dtype must be auto on a CPU (only a GPU's kernels read fp8), "
                f"got {args.kv_cache_dtype!r}"
            )
    elif args.swap_space is not None and not args.enable_prefix_caching:
        raise ConfigError(
            "--swap-space must not be given with --no-enable-prefix-caching (blocks are found by "
            f"their prefix), got {args.swap_space!r}"
        )
    filled = Namespace(**vars(args))
    for name, default in asdict(GPU_DEFAULTS if on_gpu else CPU_DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(filled, name, default)
    if on_gpu:
        _check_graph_sizes(filled)
    return filled


def _check_graph_sizes(args: Namespace) -> None:
    if args.cuda_graph_sizes and max(args.cuda_graph_sizes) > args.max_num_seqs:
        raise ConfigError(
            f"--cuda-graph-sizes must be at most --max-num-seqs {args.max_num_seqs} (they are "
            f"numbers of requests), got {max(args.cuda_graph_sizes)}"
        )
    if args.cuda_graph_sizes and args.enforce_eager:
        raise ConfigError("--cuda-graph-sizes must not be given with --enforce-eager (no graphs)")
