"""The next product's weight, asked for by the small kernels before it.

cuBLAS's kernels start when all before them has ended, and wait for the first of their weight then.
Norms, activations and the merge of attention leave memory idle for 2 to 3 microseconds each, four
times a layer. Whoever calls a small kernel may say which product comes after it: the kernel then
asks for the beginning of each row of its weight, which is what such a product reads first. (Kernels
of ours ask for themselves: `runtime.prefetch`.)
"""

from __future__ import annotations

import threading
from typing import NamedTuple, Protocol

import triton
import triton.language as tl
from torch import Tensor

from streamserve_kernels.triton.runtime import fetch_line

# What memory brings in the time of a small kernel.
AHEAD_BYTES = 8 * 2**20
_LINE_BYTES = 128
# A product of fewer is ours; one of more is not bound by its weight.
_ROWS = range(17, 257)
# Names of the counts among the arguments of `ask_ahead`: none must compile a kernel anew.
NEXT_COUNTS = ("next_width", "next_lines", "next_total")


class Announced(Protocol):
    """A product that may come next."""

    @property
    def weight(self) -> Tensor: ...
    def asks_for_itself(self, rows: int) -> bool:
        """Whether its kernel for so many rows asks for the weight before x is there."""
        ...


class Ahead(NamedTuple):
    """Arguments of `ask_ahead`."""

    weight: Tensor  # [N, K]
    width: int  # K
    lines: int  # of a row
    total: int  # of all rows


class _Next(threading.local):
    product: Announced | None = None


_next = _Next()


def announce(product: Announced) -> None:
    """Says which product comes after the next norm, activation or attention of this thread."""
    _next.product = product


def taken(x: Tensor, rows: int) -> Ahead:
    """What a small kernel before a product of so many rows asks for, once; maybe nothing of x."""
    product, _next.product = _next.product, None
    if product is None or rows not in _ROWS or product.asks_for_itself(rows):
        return Ahead(x, 0, 1, 0)
    weight = product.weight
    width = weight.shape[1]
    lines = min(AHEAD_BYTES // weight.shape[0], width * weight.itemsize) // _LINE_BYTES
    return Ahead(weight, width, lines, weight.shape[0] * lines) if lines else Ahead(x, 0, 1, 0)


@triton.jit
def ask_ahead(weight, width, lines, total, BLOCK: tl.constexpr = 128):
    """A program's share of the first `lines` of each row of the weight."""
    LINE: tl.constexpr = 128 * 8 // weight.dtype.element_ty.primitive_bitwidth
    program = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1)
    step = tl.num_programs(0) * tl.num_programs(1) * BLOCK
    for base in range(program * BLOCK, total, step):
        at = tl.minimum(base + tl.arange(0, BLOCK), total - 1)
        fetch_line(weight + (at // lines).to(tl.int64) * width + at % lines * LINE)
