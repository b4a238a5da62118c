"""What is particular to the files of one of llama.cpp's architectures, and how it is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamserve.models.names import DeltaLayout, QkvLayout

if TYPE_CHECKING:
    from streamserve.models.gguf.reading import Reading

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """``family`` is transformers' architecture; ``values`` its config's that others have not.

    ``also``: others whose files are of this one too: ``values`` says which, or it does not matter.
    ``permuted``: the rows of q and k are stored so that neighbours are rotated together.
    ``norm_offset`` was added to the weights of norms. ``windows``: the family has a window.
    ``tiled``: a delta net's value heads are stored one of each key head, then the next of each.
    ``num_kv_heads``: of each layer that attends; ``head_size``: of its heads, None where ``values``
    has what there is of that; ``intermediate_size``: of the first layers' MLPs. ``read``: names of
    values that are refused elsewhere, and count here or change nothing.
    """

    family: str
    values: Callable[[Reading], Values] = lambda reading: {}
    permuted: bool = False
    norm_offset: float = 0.0
    windows: bool = False
    also: tuple[str, ...] = ()
    tiled: bool = False
    num_kv_heads: Callable[[Reading], int | None] = lambda reading: reading.num_kv_heads
    head_size: Callable[[Reading], int | None] = lambda reading: reading.head_size
    intermediate_size: Callable[[Reading], int | None] = lambda reading: reading.optional_integer(
        "feed_forward_length"
    )
    read: tuple[str, ...] = ()
    qkv_layout: QkvLayout = "stacked"
    delta_layout: DeltaLayout = "stacked"


def has_bias(reading: Reading, module: str) -> bool:
    return reading.has_tensor(f"blk.0.{module}.bias")


def turning_share(reading: Reading) -> float:
    """Of each head, for families that do not turn all of it where nothing is said."""
    size = reading.head_size
    return rotary_factor(reading.integer_or(size, "rope.dimension_count"), size)


def rotary_factor(rotary_dim: int, head_size: int) -> float:
    """The share of a head that turns, such that the family counts ``rotary_dim`` elements."""
    factor = rotary_dim / head_size
    while int(head_size * factor) < rotary_dim:
        factor = math.nextafter(factor, 2.0)
    return factor


def layer_types(reading: Reading) -> list[str] | None:
    """Which layers have a window, where the file lists them."""
    key = reading.key("attention.sliding_window_pattern")
    if not reading.file.metadata.is_array(key):
        return None
    kinds = ("full_attention", "sliding_attention")
    return [kinds[bool(windowed)] for windowed in reading.file.metadata.numbers(key)]


def every(reading: Reading) -> int | None:
    key = "attention.sliding_window_pattern"
    is_array = reading.file.metadata.is_array(reading.key(key))
    return None if is_array else reading.optional_integer(key)
