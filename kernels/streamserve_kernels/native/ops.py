"""The functions of the contract on tensors, each a program of one or two instructions."""

from __future__ import annotations

import array
from collections.abc import Sequence

import torch
from torch import Tensor

from streamserve_kernels.float8 import refuse_float8
from streamserve_kernels.interface import ActivationKind, GatedKind, PrefixGroups
from streamserve_kernels.native.execute import double_bits, group_fields, pack_step, run_at_once
from streamserve_kernels.native.layout import check_head_sizes
from streamserve_kernels.native.library import ACTIVATION_CODES, GATED_CODES
from streamserve_kernels.pool import pool

# Elements below which a second thread costs more than it saves.
_PARALLEL_ELEMENTS = 16384


def _threads(elements: int) -> int:
    return 1 if elements < _PARALLEL_ELEMENTS else pool().threads()


def _bfloat16(name: str, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype != torch.bfloat16:
            raise TypeError(f"{name} must be bfloat16, got {tensor.dtype}")


def _require(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raises TypeError unless x is what is read by address: this dtype, rows adjacent."""
    if x.dtype != dtype or (x.stride(-1) != 1 and x.shape[-1] > 1):
        raise TypeError(f"{name} must be contiguous {dtype}, got {x.dtype} at stride {x.stride()}")


def _norm(
    operation: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    offset: float,
) -> Tensor | tuple[Tensor, Tensor]:
    _bfloat16("x, residual, weight and bias", x, residual, weight, bias)
    width, group = x.shape[-1], 1
    if weight is not None and weight.dim() == 2:
        x, group = x.contiguous(), weight.shape[0]
        weight = weight.flatten()
    for tensor, size in ((weight, group * width), (bias, width)):
        if tensor is not None and (tensor.shape != (size,) or not tensor.is_contiguous()):
            raise ValueError(f"weight and bias must be {width} adjacent numbers")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} is not of the shape {tuple(x.shape)}")
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    stride = x.stride(0) if x.dim() == 2 else width
    if residual is not None:
        residual = residual.contiguous()
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    total = None if residual is None else torch.empty(x.shape, dtype=torch.bfloat16)
    args = (
        out.data_ptr(),
        0 if total is None else total.data_ptr(),
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        width,
        double_bits(eps),
        double_bits(offset),
        0,
        group,
        group * stride,
        group * width,
        width if group > 1 else 0,
    )
    rows = x.numel() // (group * width)
    run_at_once([(operation, args)], pack_step(rows), _threads(x.numel()))
    return out if total is None else (out, total)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `naive.rms_norm`."""
    return _norm("rms_norm", x, weight, None, eps, residual, weight_offset)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `naive.layer_norm`."""
    return _norm("layer_norm", x, weight, bias, eps, residual, 0.0)


def _rotary(
    query: Tensor | None,
    key: Tensor,
    value: Tensor | None,
    positions: Tensor | None,
    cos_sin: Tensor | None,
    caches: tuple[Tensor, Tensor, Tensor] | None,
    interleaved: bool,
) -> None:
    """Turns query and key, then writes key and value into `caches` (keys, values, slots)."""
    for tensor in (query, key, value):
        if tensor is None:
            continue
        _bfloat16("query, key and value", tensor)
        if tensor.stride(2) != 1 or tensor.stride(1) != tensor.shape[2]:
            raise TypeError("the heads of a token must be adjacent")
    slots = 0
    if caches is not None:
        key_cache, value_cache, slot_mapping = caches
        refuse_float8("native", key_cache, value_cache)
        _bfloat16("the caches", key_cache, value_cache)
        _require("slot_mapping", slot_mapping, torch.int64)
        if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
            raise TypeError("the caches must be contiguous")
        check_head_sizes(key.shape[2], 16, key_cache.shape[2])
        for tensor, cache in ((key, key_cache), (value, value_cache)):
            if tensor is None or cache.shape[1:] != (
                key.shape[1],
                key_cache.shape[2],
                tensor.shape[2],
            ):
                raise ValueError(
                    "keys and values do not fit the caches of shapes "
                    f"{tuple(key_cache.shape)} and {tuple(value_cache.shape)}"
                )
        slots = slot_mapping.data_ptr()
    if cos_sin is not None and positions is not None:
        _require("positions", positions, torch.int64)
        _require("cos_sin", cos_sin, torch.float32)
        if cos_sin.shape[1] > key.shape[2]:
            raise ValueError(f"{cos_sin.shape[1]} elements do not turn in {key.shape[2]}")
    args = (
        0 if query is None else query.data_ptr(),
        key.data_ptr(),
        0 if value is None else value.data_ptr(),
        0 if cos_sin is None else cos_sin.data_ptr(),
        0 if caches is None else caches[0].data_ptr(),
        0 if caches is None else caches[1].data_ptr(),
        0 if query is None else query.stride(0),
        key.stride(0),
        0 if value is None else value.stride(0),
        0 if query is None else query.shape[1],
        key.shape[1],
        key.shape[2],
        0 if value is None else value.shape[2],
        0 if cos_sin is None else cos_sin.shape[1],
        16 if caches is None else caches[0].shape[2],
        int(interleaved),
    )
    places = 0 if positions is None else positions.data_ptr()
    step = pack_step(key.shape[0], 0, 0, 0, 0, places, slots)
    elements = key.numel() + (0 if query is None else query.numel())
    run_at_once([("rotary_write", args)], step, _threads(elements))


def rotary_embedding(
    query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See `naive.rotary_embedding`: in place."""
    _rotary(query, key, None, positions, cos_sin.contiguous(), None, interleaved)
    return query, key


def rotary_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """See `naive.rotary_write_kv`: one pass over the step's tokens."""
    caches = (key_cache, value_cache, slot_mapping)
    _rotary(query, key, value, positions, cos_sin.contiguous(), caches, interleaved)
    return query, key


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See `naive.write_kv`; the blocks of the caches are in the order of `unpack_keys`."""
    _rotary(None, key, value, None, None, (key_cache, value_cache, slot_mapping), False)


def copy_blocks(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """See `naive.copy_blocks`: every cache in one call."""
    if not all(cache.is_contiguous() for cache in caches):
        raise TypeError("the caches must be contiguous")
    _require("src", src, torch.int64)
    _require("dst", dst, torch.int64)
    if src.shape != dst.shape:
        raise ValueError(f"{src.shape[0]} blocks cannot be copied to {dst.shape[0]}")
    addresses = array.array("q", [cache.data_ptr() for cache in caches])
    sizes = array.array("q", [cache[0].nbytes for cache in caches])
    args = (
        addresses.buffer_info()[0],
        sizes.buffer_info()[0],
        src.data_ptr(),
        dst.data_ptr(),
        src.shape[0],
    )
    elements = sum(sizes) * src.shape[0] // 4
    run_at_once([("copy_blocks", args)], pack_step(len(caches)), _threads(elements))


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    prefix_groups: PrefixGroups | None = None,
    max_query_len: int | None = None,
) -> Tensor:
    """See `naive.paged_attention`; the blocks of the caches are in the order of `unpack_keys`."""
    refuse_float8("native", key_cache, value_cache)
    _bfloat16("query and the caches", query, key_cache, value_cache)
    _require("block_table", block_table, torch.int32)
    _require("seq_lens", seq_lens, torch.int32)
    _require("query_start_loc", query_start_loc, torch.int32)
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise TypeError("the caches must be contiguous")
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    value_size = value_cache.shape[3]
    check_head_sizes(head_size, value_size, block_size)
    if query.stride(2) != 1 or query.stride(1) != head_size:
        query = query.contiguous()
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.float().contiguous()
    if sinks is not None:
        sinks = sinks.float().contiguous()
    output = torch.empty(num_tokens, num_heads, value_size, dtype=torch.bfloat16)
    args = (
        output.data_ptr(),
        query.data_ptr(),
        query.stride(0),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        num_heads,
        num_kv_heads,
        head_size,
        value_size,
        block_size,
        double_bits(scale),
        window or 0,
        0 if alibi_slopes is None else alibi_slopes.data_ptr(),
        double_bits(soft_cap or 0.0),
        0 if sinks is None else sinks.data_ptr(),
    )
    num_blocks = key_cache.shape[0]
    sizes = (num_heads, num_kv_heads, value_size, block_size, int(bool(window)), num_blocks)
    step = pack_step(
        num_tokens,
        0,
        seq_lens.shape[0],
        block_table.stride(0),
        0,
        0,
        0,
        0,
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        *group_fields(prefix_groups),
    )
    run_at_once([("attend", args), ("attend_merge", args)], step, pool().threads(), sizes)
    return output


def gated_activation(x: Tensor, kind: GatedKind) -> Tensor:
    """See `naive.gated_activation`."""
    if x.shape[-1] % 2:
        raise ValueError(f"a gate and its values cannot share {x.shape[-1]} elements")
    return _activate("gated", x, kind, x.shape[-1] // 2)


def activation(x: Tensor, kind: ActivationKind) -> Tensor:
    """See `naive.activation`."""
    return _activate("activation", x, kind, x.shape[-1])


def _activate(operation: str, x: Tensor, kind: str, width: int) -> Tensor:
    codes = GATED_CODES if operation == "gated" else ACTIVATION_CODES
    if (code := codes.get(kind)) is None:
        raise ValueError(f"activation kind {kind!r} is not known")
    _bfloat16("x", x)
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    stride = x.stride(0) if x.dim() == 2 else x.shape[-1]
    out = torch.empty((*x.shape[:-1], width), dtype=torch.bfloat16)
    args = (out.data_ptr(), x.data_ptr(), width, code, 0, stride)
    # an exp is worth about four copies
    threads = _threads(4 * x.numel())
    run_at_once([(operation, args)], pack_step(x.numel() // x.shape[-1]), threads)
    return out
