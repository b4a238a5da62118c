"""How the elements of a cache block lie, and which sizes can lie so."""

from __future__ import annotations

from torch import Tensor


def check_head_sizes(head_size: int, value_head_size: int, block_size: int) -> None:
    """Raises ValueError unless the caches can take these sizes."""
    if head_size % 2 or value_head_size % 16 or block_size % 16:
        raise ValueError(
            "the native cache takes blocks of a multiple of 16 tokens, heads of an even size and "
            f"value heads of a multiple of 16: got {block_size}, {head_size}, {value_head_size}"
        )


def kv_cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
) -> tuple[int, ...]:
    """As `naive`, but the elements of a block lie in another order: see `unpack_keys`."""
    if block_size % 16 or head_size % 2:
        check_head_sizes(head_size, 16, block_size)
    return (num_blocks, num_kv_heads, block_size, head_size)


def unpack_keys(blocks: Tensor) -> Tensor:
    """Key blocks [n, Hkv, S, D], inside [S / 16][D / 2][16][2] -> [n, Hkv, S, D] by token."""
    n, heads, size, head_size = blocks.shape
    lanes = blocks.reshape(n, heads, size // 16, head_size // 2, 16, 2)
    return lanes.transpose(3, 4).reshape(blocks.shape)


def unpack_values(blocks: Tensor) -> Tensor:
    """Value blocks [n, Hkv, S, Dv], inside [S / 2][Dv][2] -> [n, Hkv, S, Dv] by token."""
    n, heads, size, value_size = blocks.shape
    lanes = blocks.reshape(n, heads, size // 2, value_size, 2)
    return lanes.transpose(3, 4).reshape(blocks.shape)
