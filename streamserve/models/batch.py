"""One step's tensors, and the cache they point into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from streamserve.models.model_shape import ModelShape
from streamserve.models.spec import AttentionSpec
from streamserve_kernels import Kernels, PrefixGroups, huge_pages
from streamserve_kernels.adapters import StepAdapters
from streamserve_kernels.recurrent import StepStates

KVCache: TypeAlias = list[tuple[Tensor, Tensor]]
"""Per layer, the key cache and the value cache, in the shape that the kernels asked for.

Of a layer that keeps a state: the convolution's last inputs [X, W - 1, C] in the activations'
dtype, and the matrices [X, Hv, D, Dv] in float32, of X slots.
"""

_TOUCHED_PIECES = 16
_ALIGNMENT = 512  # bytes, as torch's own allocator for GPUs has it


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of one step: T tokens of R sequences, flattened in sequence order.

    Everything lives on the model's device. A row of ``block_table`` is padded with any valid block
    id past the blocks that its sequence has.
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, each token's place in its own sequence
    slot_mapping: Tensor  # [T] int64, block_id * block_size + offset; -1 is padding: not written
    query_start_loc: Tensor  # [R + 1] int32, where each sequence's tokens start in T
    seq_lens: Tensor  # [R] int32, cached tokens and this step's together
    block_table: Tensor  # [R, M] int32
    logits_indices: Tensor  # [L] int64 into T, strictly increasing: rows that need logits
    prefix_groups: PrefixGroups | None = None  # sequences that share leading blocks
    adapters: StepAdapters | None = None  # None: no sequence has one
    states: StepStates | None = None  # where a model keeps some
    hidden_states: Tensor | None = None  # [T, H], what a draft head is given besides
    # What the host knows, so that no device is asked: bounds of a sequence's tokens in this step,
    # and of seq_lens.
    max_query_len: int | None = None
    max_seq_len: int | None = None


def allocate_kv_cache(
    spec: ModelShape,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    *,
    num_state_slots: int = 0,
    state_dtype: torch.dtype | None = None,
) -> KVCache:
    """Zeroed caches for ``num_blocks`` blocks of ``block_size`` tokens in every layer.

    ``dtype`` is the cache's own: that of the activations, or a narrower one that the kernels
    convert from and to. Layers that keep a state have ``num_state_slots`` of them; ``state_dtype``
    is the activations', where the cache's is another. On a CPU their memory is only promised: see
    `touch_kv_cache`.

    Raises what torch or the system raises when the memory is not there; plan with
    `kv_bytes_per_block` and `state_bytes`.
    """
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
    for cache in spec.caches():
        if isinstance(cache, AttentionSpec):
            heads = cache.num_kv_heads
            for head_size in (cache.query_key_head_size, cache.value_head_size):
                shape = kernels.kv_cache_shape(num_blocks, block_size, heads, head_size)
                shapes.append((shape, dtype))
        else:
            conv, matrices = cache.conv_state_shape, cache.matrices_shape
            shapes.append(((num_state_slots, *conv), state_dtype or dtype))
            shapes.append(((num_state_slots, *matrices), torch.float32))
    # On a CPU in huge pages where the system has them. A page is cleared when it is first written:
    # 4 GiB in small pages are a million faults, seconds before the server is ready. Attention,
    # which reads blocks all over the cache, misses fewer translations too.
    if device.type == "cpu":
        caches = [huge_pages.zeros(shape, held) for shape, held in shapes]
    else:
        caches = zeros_in_one_piece(shapes, device)
    return list(zip(caches[::2], caches[1::2], strict=True))


def zeros_in_one_piece(
    shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device
) -> list[Tensor]:
    """Zeroed tensors in one allocation: it takes what it needs, not what an allocator rounds to."""
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in shapes]
    starts = [0, *accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    piece = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
    return [
        piece[start : start + size].view(dtype).view(shape)
        for start, size, (shape, dtype) in zip(starts, sizes, shapes, strict=False)
    ]


def block_caches(caches: KVCache, states: Sequence[Tensor]) -> list[Tensor]:
    """Those whose rows are blocks, what a copy of a block is in: all but ``states``."""
    are_states = {id(cache) for cache in states}
    return [cache for pair in caches for cache in pair if id(cache) not in are_states]


def state_caches(spec: ModelShape, caches: KVCache) -> list[Tensor]:
    """Those whose rows are slots: what a copy of a state is in."""
    pairs = zip(spec.caches(), caches, strict=True)
    return [cache for held, pair in pairs if not isinstance(held, AttentionSpec) for cache in pair]


def touch_kv_cache(caches: KVCache, is_over: Callable[[], bool] = lambda: False) -> None:
    """Has the system provide the memory of caches on a CPU, the lowest rows of all layers first.

    What is in them stays. Safe while steps use them: one that is ahead waits for a page at most.
    Returns early once ``is_over()``.
    """
    for piece in range(_TOUCHED_PIECES):
        for cache in (cache for pair in caches for cache in pair):
            if is_over():
                return
            low = cache.shape[0] * piece // _TOUCHED_PIECES
            high = cache.shape[0] * (piece + 1) // _TOUCHED_PIECES
            if cache.device.type == "cpu" and high > low:
                huge_pages.touch(cache[low:high])


def kv_bytes_per_block(spec: ModelShape, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes in all layers together, in a cache of ``dtype``."""
    elements = sum(attention.key_size + attention.value_size for attention in spec.attentions())
    return elements * block_size * dtype.itemsize


def state_bytes(spec: ModelShape, dtype: torch.dtype) -> int:
    """Bytes that one slot takes in all layers together, with activations of ``dtype``.

    0: no layer keeps a state.
    """
    return sum(
        prod(cache.conv_state_shape) * dtype.itemsize
        + prod(cache.matrices_shape) * torch.float32.itemsize
        for cache in spec.caches()
        if not isinstance(cache, AttentionSpec)
    )
