"""Which device serves: what torch sees, and what was asked for."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from streamserve.errors import ConfigError

# The first with bfloat16 in its matrix units: Ampere.
MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class VisibleGpu:
    """A GPU that torch can use."""

    name: str
    capability: tuple[int, int]

    @property
    def is_usable(self) -> bool:
        """Whether our kernels run on it."""
        return self.capability >= MIN_CAPABILITY

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name} (compute capability {major}.{minor})"


@dataclass(frozen=True, slots=True)
class VisibleGpus:
    """What torch sees: its GPUs in order, or why there are none."""

    gpus: tuple[VisibleGpu, ...] = ()
    why_none: str = ""

    def __str__(self) -> str:
        if not self.gpus:
            return self.why_none
        listed = ", ".join(f"cuda:{i}: {gpu}" for i, gpu in enumerate(self.gpus))
        return f"torch {torch.__version__} sees {listed}"


def visible_gpus() -> VisibleGpus:
    """Asks torch, once and without a warning on stderr: what it warns of is in the answer."""
    version = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return VisibleGpus(why_none=f"{version} was built without CUDA")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        reasons = "".join(f": {warning.message}" for warning in caught[:1])
        return VisibleGpus(why_none=f"{version} sees no GPU{reasons}")
    return VisibleGpus(
        tuple(
            VisibleGpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
            for i in range(count)
        )
    )


def device_of_rank(first: torch.device, rank: int, size: int, visible: VisibleGpus) -> torch.device:
    """The GPU of one of ``size`` ranks, which have ``first`` and those that follow it.

    Raises ConfigError, with what torch sees, where one is missing or too old.
    """
    gpus = visible.gpus[first.index : first.index + size]
    if len(gpus) < size or not all(gpu.is_usable for gpu in gpus):
        raise ConfigError(
            f"--tensor-parallel-size {size} must have as many usable GPUs from {first} on: "
            f"{visible}"
        )
    return torch.device("cuda", first.index + rank)


def choose_device(name: str, visible: VisibleGpus) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; a GPU always with its index.

    ``auto`` takes the first GPU that our kernels run on, else the CPU. Raises ConfigError, with
    what torch sees, for a GPU that is not there or too old, and for any other name.
    """
    kind, _, index = name.partition(":")
    if name == "cpu":
        return torch.device("cpu")
    if name == "auto":
        usable = [i for i, gpu in enumerate(visible.gpus) if gpu.is_usable]
        return torch.device("cuda", usable[0]) if usable else torch.device("cpu")
    if kind != "cuda" or not (index.isdecimal() or name == "cuda"):
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    number = int(index or 0)
    if number >= len(visible.gpus):
        raise ConfigError(f"--device {name} is not there: {visible}")
    if not visible.gpus[number].is_usable:
        major, minor = MIN_CAPABILITY
        raise ConfigError(
            f"--device {name} must have compute capability {major}.{minor} or more: {visible}"
        )
    return torch.device("cuda", number)
