"""A row of the table: what to call, what it is checked against, and the floor of its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from device_bench.timing import ROTATED_BYTES, Call, num_copies
from streamserve_kernels import Kernels
from streamserve_kernels.ceilings import Ceilings

Rate = Literal["bfloat16", "float8"]


class CheckError(Exception):
    """A kernel's result is not that of its naive twin."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """A layer's sizes, and by how much the rows' batches and contexts are divided."""

    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    hidden: int = 4096
    intermediate: int = 14336
    vocab: int = 128256
    layers: int = 32
    fewer_requests: int = 1
    fewer_tokens: int = 1

    def requests(self, count: int) -> int:
        return max(1, count // self.fewer_requests)

    def tokens(self, count: int) -> int:
        return max(1, count // self.fewer_tokens)

    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of a layer's products, and the head's."""
        attention = self.heads * self.head_size
        return {
            "qkv": (attention + 2 * self.kv_heads * self.head_size, self.hidden),
            "out": (self.hidden, attention),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "head": (self.vocab, self.hidden),
        }


LLAMA_8B = Sizes()
# A rehearsal: every row in milliseconds, also under Triton's interpreter.
TINY = Sizes(
    heads=4,
    kv_heads=2,
    head_size=64,
    hidden=256,
    intermediate=256,
    vocab=1024,
    layers=2,
    fewer_requests=32,
    fewer_tokens=32,
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What rows are built from."""

    kernels: Kernels
    naive: Kernels
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    rotated_bytes: int = ROTATED_BYTES
    with_flex: bool = False

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def ints(self, values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def rotated(self, make: Callable[[], Call], num_bytes: float) -> list[Call]:
        """Calls with buffers of their own, together more than the caches hold."""
        return [make() for _ in range(num_copies(num_bytes, self.rotated_bytes))]


@dataclass(frozen=True, slots=True)
class Case:
    """A row's work, built. `peers` make calls like `calls` when their turn comes.

    `num_bytes` is what one call must read and write, `flops` its multiplications and additions.
    """

    calls: Sequence[Call]
    check: Callable[[], None]
    num_bytes: float
    flops: float = 0.0
    rate: Rate = "bfloat16"
    peers: dict[str, Callable[[], Sequence[Call]]] = field(default_factory=dict)

    def floor(self, ceilings: Ceilings) -> tuple[float, str]:
        """The least seconds that one call can take, and what sets them: `bytes` or `FLOPs`."""
        of_bytes = self.num_bytes / ceilings.bandwidth
        rate = ceilings.product
        if self.rate == "float8" and ceilings.product_fp8 is not None:
            rate = ceilings.product_fp8
        of_flops = self.flops / rate
        return (of_flops, "FLOPs") if of_flops > of_bytes else (of_bytes, "bytes")


@dataclass(frozen=True, slots=True)
class Row:
    """`build` allocates and may compile; it runs when the row's turn comes."""

    group: str
    name: str
    build: Callable[[Bench], Case]

    @property
    def title(self) -> str:
        return f"{self.group}: {self.name}"


def check_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "output") -> None:
    """Compares row by row (the last dimension): the error's norm over the expected row's.

    Attention over long contexts gives small numbers, which an absolute tolerance would let pass
    whatever they are. Raises CheckError, also for NaN.
    """
    if actual.shape != expected.shape:
        raise CheckError(f"{what}: shape {list(actual.shape)}, not {list(expected.shape)}")
    wanted = expected.float()
    error = (actual.float() - wanted).norm(dim=-1)
    # A row of zeros is compared with an ordinary one.
    size = wanted.norm(dim=-1)
    worst = (error / size.clamp(min=1e-3 * float(size.max()) + 1e-30)).max()
    if not float(worst) <= tolerance:
        raise CheckError(f"{what}: a row is off by {float(worst):.2%} of its norm")


def check_equal(actual: Tensor, expected: Tensor, what: str = "output") -> None:
    """Raises CheckError unless every element is the same."""
    if not torch.equal(actual, expected):
        wrong = int((actual != expected).sum()) if actual.shape == expected.shape else "all"
        raise CheckError(f"{what}: {wrong} of {expected.numel()} elements differ")


def tolerance(dtype: torch.dtype) -> float:
    """Of a row's norm: a few roundings in the dtype."""
    return {torch.float32: 1e-4, torch.float16: 5e-3}.get(dtype, 2e-2)
