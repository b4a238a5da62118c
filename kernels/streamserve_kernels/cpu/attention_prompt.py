"""Attention of many query rows: a chunk of a prompt, tile by tile through torch's flash attention.

A tile of queries at positions [a, b) sees the keys before it without any mask, in segments, and
itself causally; each part gives (output, log-sum-exp) and parts are merged (Dao et al. 2022). In
bfloat16 the products run on the matrix units (AMX). Memory is bounded by the tile and the segment,
not by the prompt.

        keys   0 ........ 4096 ........ a ..... b
        a..b  [ segment ][ segment    ][causal ]

Every part is padded to whole multiples, of queries and of keys: in bfloat16 torch compiles a
product for each shape that it meets, and keeps it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamserve_kernels.interface import (
    PROMPT_KEY_MULTIPLE,
    PROMPT_KEY_SEGMENT,
    PROMPT_QUERY_MULTIPLE,
)

# Query rows of a tile that needs an explicit mask.
MASKED_TILE = 256


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _gather(cache: Tensor, table: Tensor, low: int, high: int, size: int) -> Tensor:
    """Keys or values of positions [low, high), then zeros, as [Hkv, 1, size, D]."""
    num_kv_heads, block_size, head_size = cache.shape[1:]
    first = low // block_size
    offset = low - first * block_size
    # The blocks are picked out of the cache as it lies: index_select copies a whole cache that it
    # is given transposed.
    tiles = cache.index_select(0, table[first : -(-high // block_size)])  # [n, Hkv, S, D]
    num_blocks = max(tiles.shape[0], -(-(offset + size) // block_size))
    rows = cache.new_empty(num_kv_heads, num_blocks * block_size, head_size)
    blocks = rows.view(num_kv_heads, num_blocks, block_size, head_size)
    blocks[:, : tiles.shape[0]].copy_(tiles.transpose(0, 1))
    rows[:, offset + high - low :] = 0.0
    return rows[:, None, offset : offset + size]


def _pad_queries(rows: Tensor, size: int) -> Tensor:
    """[Hkv, G, q, D] -> [Hkv, G, size, D]; the rows added are zeros."""
    if rows.shape[2] == size:
        return rows
    padded = rows.new_zeros(*rows.shape[:2], size, rows.shape[3])
    padded[:, :, : rows.shape[2]] = rows
    return padded


def _bias(
    queries: tuple[int, int],
    keys: tuple[int, int],
    num_keys: int,
    window: int | None,
    slopes: Tensor | None,
    *,
    masked: bool,
) -> Tensor | None:
    """Additive bias [Hkv or 1, G or 1, queries or 1, num_keys] in float32; None where it is all 0.

    Keys past ``keys[1]`` are padding and hidden.

    Without a mask, ALiBi's slope·(j - i) is given as slope·(j - first query), one row for all: the
    rest is constant in a row, does not change its softmax, and `_attend`'s caller adds it to the
    log-sum-exp.
    """
    j = torch.arange(keys[0], keys[0] + num_keys)
    i = torch.arange(*queries)[:, None] if masked else torch.tensor([[queries[0]]])
    bias = None
    if slopes is not None:
        bias = slopes[..., None, None] * (j - i).float()
    if masked:
        visible = j <= i
        if window is not None:
            visible &= i - j < window
    elif num_keys > keys[1] - keys[0]:
        visible = (j < keys[1])[None]
    else:
        return bias
    mask = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
    return mask[None, None] if bias is None else bias + mask


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    soft_cap: float | None,
    *,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """One part: query [Hkv, G, q, D] on key, value [Hkv, 1, n, D] -> output and log-sum-exp."""
    group = query.shape[1]
    if soft_cap is None and key.shape[3] == value.shape[3]:
        key, value = key.expand(-1, group, -1, -1), value.expand(-1, group, -1, -1)
        if bias is not None:
            bias = bias.expand(query.shape[0], group, -1, -1)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
        )
        return output, lse
    scores = scale * (query.float() @ key.float().transpose(2, 3))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if bias is not None:
        scores += bias
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ value.float(), lse


def prompt_attention(
    output: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    table: Tensor,
    seq_len: int,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> None:
    """Fills output [q, Hq, Dv] for one request's queries [q, Hq, D]; table [M] are its blocks."""
    length, num_heads, head_size = query.shape
    num_kv_heads = key_cache.shape[1]
    group = num_heads // num_kv_heads
    start = seq_len - length
    if window is not None and window >= seq_len:
        window = None
    plain = soft_cap is None and key_cache.shape[3] == value_cache.shape[3]
    explicit = window is not None or slopes is not None or not plain
    tile = MASKED_TILE if explicit else length
    segment = PROMPT_KEY_SEGMENT if plain else PROMPT_KEY_SEGMENT // 4
    grouped = query.view(length, num_kv_heads, group, head_size).permute(1, 2, 0, 3)
    if slopes is not None:
        slopes = slopes.float().view(num_kv_heads, group)
    for a in range(start, seq_len, tile):
        b = min(a + tile, seq_len)
        num_rows = _round_up(b - a, PROMPT_QUERY_MULTIPLE)
        rows = _pad_queries(grouped[:, :, a - start : b - start], num_rows)
        if window is not None:
            parts = [(max(0, a - window + 1), b)]
        else:
            parts = [(low, min(low + segment, a)) for low in range(0, a, segment)] + [(a, b)]
        merged: tuple[Tensor, Tensor] | None = None
        for low, high in parts:
            causal = high == b and not explicit
            num_keys = num_rows if causal else _round_up(high - low, PROMPT_KEY_MULTIPLE)
            key = _gather(key_cache, table, low, high, num_keys)
            value = _gather(value_cache, table, low, high, num_keys)
            bias = None
            if not causal:
                masked = high == b
                queries = (a, a + num_rows)
                bias = _bias(queries, (low, high), num_keys, window, slopes, masked=masked)
            part = _attend(rows, key, value, bias, scale, soft_cap, is_causal=causal)
            if slopes is not None and high != b:
                part = (part[0], part[1] - slopes[..., None] * torch.arange(num_rows).float())
            merged = part if merged is None else _merge(*merged, *part)
        assert merged is not None
        result, lse = merged
        if sinks is not None:
            share = torch.sigmoid(lse - sinks.float().view(num_kv_heads, group, 1))
            result = result.float() * share[..., None]
        target = output[a - start : b - start].view(b - a, num_kv_heads, group, -1)
        target.copy_(result[:, :, : b - a].permute(2, 0, 1, 3))


def _merge(
    output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Two softmax-weighted averages over disjoint keys as one over their union."""
    share = torch.sigmoid(lse_b - lse_a)[..., None]
    return torch.lerp(output_a.float(), output_b.float(), share), torch.logaddexp(lse_a, lse_b)
