"""Which of a few kernels is best for a shape: measured once per device, bounded, kept on disk.

Nothing is measured while serving. `tune` is called before CUDA graphs are captured, with all linear
layers of a model and the numbers of rows that matter; it also compiles what was chosen. What it
finds is kept in a file per device and versions, so that the next start measures nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from streamserve_kernels.triton.runtime import overlaps

DEFAULT_SECONDS = 20.0
# What was found among other candidates is not read: there may be better ones now.
_CANDIDATES = 3
# Between them the calls of a measurement should touch more than a last-level cache holds.
_MEASURED_BYTES = 256 * 2**20
_MOST_CALLS = 64
# Of the norm of a result: in bfloat16 weights, inputs and sums are each a 512th off at most.
_DISAGREEMENT = 0.02
_REPLAYS = 3
# What a kernel that overlaps saves in a step, and not where it is measured behind itself: its own
# start behind whatever is before it, and that of whatever comes after it. Seen on an H200.
_OVERLAPPED_MS = 1e-3


class Config(NamedTuple):
    """A kernel and its sizes; what a size means is the kernel's business."""

    kernel: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 4
    stages: int = 1
    overlap: bool = False  # starts before the kernel before it has ended
    splits: int = 1  # of the inputs


LIBRARY = Config("library")  # cuBLAS


@lru_cache(maxsize=64)
def usable(candidates: tuple[Config, ...], device: torch.device) -> tuple[Config, ...]:
    """Those that the device has the instructions for.

    Of a kernel that overlaps, the same without it is not tried: see `_OVERLAPPED_MS`.
    """
    if overlaps(device):
        return tuple(
            config
            for config in candidates
            if config.overlap or config._replace(overlap=True) not in candidates
        )
    return tuple(config for config in candidates if not config.overlap)


@runtime_checkable
class Tunable(Protocol):
    """A linear layer with a choice of kernels. The first candidate is the one without tuning."""

    @property
    def choices(self) -> dict[int, Config]: ...
    @property
    def in_features(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def nbytes(self) -> int: ...
    def tuning_key(self, rows: int) -> str:
        """Equal for layers that the same measurement holds for. `rows` is a bucket."""
        ...

    def candidates(self, rows: int) -> tuple[Config, ...]: ...
    def run(self, x: Tensor, config: Config) -> Tensor: ...


Measure = Callable[[Sequence[Tunable], Tensor, Config], float]


def bucket(rows: int) -> int:
    """The power of two that stands for this number of rows."""
    return 1 << (rows - 1).bit_length()


def default_directory() -> Path:
    home = os.path.expanduser("~")
    # In no environment and no passwd: a container's user by number.
    return Path("/" if home == "~" else home) / ".cache" / "streamserve"


def tune(
    linears: Iterable[Any],
    rows: Iterable[int],
    *,
    directory: Path | None = None,
    seconds: float = DEFAULT_SECONDS,
    measure: Measure | None = None,
) -> dict[str, Config]:
    """Chooses a kernel for each layer that has a choice and each number of rows, by key.

    Takes up to `seconds` of measuring and the compilation of one candidate more; keys that are not
    reached take their first candidate, and are measured at the next start. Where no `measure` (the
    time of running a config on these layers in turn) is given and there is no GPU, nothing is
    measured. All that was chosen has run when this returns.
    """
    tunable = [linear for linear in linears if isinstance(linear, Tunable)]
    layers: dict[str, tuple[int, list[Tunable]]] = {}
    for count in sorted({bucket(count) for count in rows}):
        for linear in tunable:
            layers.setdefault(linear.tuning_key(count), (count, []))[1].append(linear)
    if not layers:
        return {}
    device = next(iter(layers.values()))[1][0].device
    if measure is None and device.type == "cuda":
        measure = measure_on_gpu
    path = _path(directory or default_directory(), device)
    known = _read(path)
    deadline = time.monotonic() + seconds
    chosen: dict[str, Config] = {}
    found: dict[str, Config] = {}
    for key, (count, same) in layers.items():
        candidates = same[0].candidates(count)
        # Not zeros: they cost less power, and the clock would be higher than it is when serving.
        size = count * same[0].in_features
        x = torch.linspace(-1.0, 1.0, size, device=device).to(same[0].dtype).view(count, -1)
        config = known.get(key)
        if config not in (*candidates, LIBRARY):
            config = candidates[0]
            if len(candidates) > 1 and measure is not None and time.monotonic() < deadline:
                best = _best(measure, same, x, candidates, deadline)
                if best is not None:
                    config = found[key] = best
        for linear in same:
            linear.choices[count] = config
        same[0].run(x, config)
        chosen[key] = config
    if found:
        _write(path, found)
    return chosen


def _best(
    measure: Measure,
    layers: Sequence[Tunable],
    x: Tensor,
    candidates: tuple[Config, ...],
    deadline: float,
) -> Config | None:
    """The fastest, or None if time was up before all were measured.

    Where none can run, or all are wrong, the library is: every layer has it.
    """
    times = {}
    for config in candidates:
        if time.monotonic() >= deadline:
            return None
        times[config] = measure(layers, x, config) - _OVERLAPPED_MS * config.overlap
    best = min(times, key=lambda config: times[config])
    return best if times[best] < float("inf") else LIBRARY


def measure_on_gpu(layers: Sequence[Tunable], x: Tensor, config: Config) -> float:
    """Milliseconds of a call, in a CUDA graph of calls on the layers in turn.

    A graph, because that is how the calls will run: launched from Python one by one they would
    mostly wait for the launches. inf for a config that cannot run, or, with a warning, for one
    whose results there are not the library's.
    """
    calls = max(8, min(_MOST_CALLS, _MEASURED_BYTES // max(1, layers[0].nbytes)))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(x.device)
    # Not `torch.cuda.graph`, which collects garbage and empties the allocator's cache every time.
    with torch.cuda.stream(_capture_stream(x.device)):
        try:
            layers[0].run(x, config)
        except TritonError:  # more shared memory than there is, or what this card has not
            return float("inf")
        torch.cuda.synchronize(x.device)
        graph.capture_begin(capture_error_mode="thread_local")
        for call in range(calls):
            result = layers[call % len(layers)].run(x, config)
        graph.capture_end()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(_REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    last = layers[(calls - 1) % len(layers)]
    if not agree(result, last.run(x, LIBRARY)):
        key = last.tuning_key(bucket(len(x)))
        warnings.warn(f"{config} is wrong on this card for {key}", RuntimeWarning, stacklevel=4)
        return float("inf")
    return best / calls


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two kernels' results differ by no more than their roundings could explain."""
    expected = expected.float()
    return bool((found.float() - expected).norm() <= _DISAGREEMENT * expected.norm())


@lru_cache(maxsize=1)
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a work space for every stream that it has met."""
    return torch.cuda.Stream(device)


def _path(directory: Path, device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    about = f"{name}-triton-{triton.__version__}-torch-{torch.__version__}-{_CANDIDATES}"
    return directory / f"tuning-{re.sub(r'[^A-Za-z0-9.+]+', '-', about)}.json"


def _read(path: Path) -> dict[str, Config]:
    """What was found before; a file that is not what we write is ignored with a warning."""
    try:
        return _parse(path)
    except FileNotFoundError:
        return {}
    except (OSError, *_BROKEN) as error:
        warnings.warn(f"{path} is ignored: {error}", RuntimeWarning, stacklevel=3)
        return {}


_BROKEN = ValueError, TypeError, AttributeError


def _parse(path: Path) -> dict[str, Config]:
    """Raises OSError, or one of `_BROKEN` for a file that is not what we write."""
    stored = json.loads(path.read_text())
    return {str(key): Config(*values) for key, values in stored.items()}


def _write(path: Path, found: dict[str, Config]) -> None:
    """Adds to what is there, whole or not at all: another server may do so at the same moment."""
    new = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                there = _parse(path)
            except (FileNotFoundError, *_BROKEN):
                there = {}
            try:
                with new.open("w") as file:
                    json.dump(there | found, file, indent=0, sort_keys=True)
                new.replace(path)
            finally:
                new.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path} was not written: {error}", RuntimeWarning, stacklevel=3)
