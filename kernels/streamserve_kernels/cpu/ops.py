"""The compiled elementwise kernels behind the signatures of `naive`.

Anything that a body does not cover (float16, odd strides, rare activations) goes to the naive twin.
"""

from __future__ import annotations

import array
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from streamserve_kernels import experts, naive
from streamserve_kernels.cpu import elementwise as bodies
from streamserve_kernels.float8 import refuse_float8
from streamserve_kernels.interface import ActivationKind, ExpertKind, GatedKind, PackedLinear
from streamserve_kernels.pool import pool
from streamserve_kernels.routing import Routing

COMPILED = (torch.bfloat16, torch.float32)
# Elements below which a second thread costs more than it saves (a region is about 3 µs).
PARALLEL_ELEMENTS = 16384
_SIGMOID_FORM = {"silu": (1.0, 0.0), "gelu_tanh": (1.5957691216057308, 0.07135481282604)}

_Run = Callable[..., None]


@lru_cache(maxsize=8)
def rms_norm_kernel(bits: int) -> _Run:
    return pool().kernel(bodies.rms_norm_body(bits), bodies.NORM_LAYOUT)


@lru_cache(maxsize=8)
def layer_norm_kernel(bits: int) -> _Run:
    return pool().kernel(bodies.layer_norm_body(bits), bodies.NORM_LAYOUT)


@lru_cache(maxsize=8)
def rotary_write_kernel(bits: int, interleaved: bool) -> _Run:
    return pool().kernel(bodies.rotary_write_body(bits, interleaved), bodies.ROTARY_LAYOUT)


@lru_cache(maxsize=8)
def gated_kernel(bits: int) -> _Run:
    return pool().kernel(bodies.gated_body(bits), bodies.GATED_LAYOUT)


@lru_cache(maxsize=1)
def copy_blocks_kernel() -> _Run:
    return pool().kernel(bodies.copy_blocks_body(), bodies.COPY_LAYOUT)


def threads_for(elements: int) -> int:
    """1, or all of the pool where there is work enough."""
    return 1 if elements < PARALLEL_ELEMENTS else pool().threads()


def require(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raises TypeError unless x is what a body reads by address: this dtype, rows adjacent."""
    if x.dtype != dtype or (x.stride(-1) != 1 and x.shape[-1] > 1):
        raise TypeError(f"{name} must be contiguous {dtype}, got {x.dtype} at stride {x.stride()}")


def _require_cache(key: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    require("slot_mapping", slots, torch.int64)
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise TypeError("the caches must be contiguous")
    if key_cache.shape[1:] != (key.shape[1], key_cache.shape[2], key.shape[2]):
        raise ValueError(f"key {tuple(key.shape)} does not fit a cache of {tuple(key_cache.shape)}")


def _rows(x: Tensor) -> tuple[int, int] | None:
    """(rows, stride of a row) if x is rows at one stride with adjacent elements, else None."""
    if x.dim() == 2:
        return (x.shape[0], x.stride(0)) if x.stride(1) == 1 else None
    return (x.numel() // x.shape[-1], x.shape[-1]) if x.numel() and x.is_contiguous() else None


def _norm(
    kernel: Callable[[int], _Run],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    offset: float,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """Runs a norm body; None where it does not apply."""
    dtype = x.dtype
    shape = _rows(x)
    if shape is None or dtype not in COMPILED or (weight is not None and weight.dtype != dtype):
        return None
    if bias is not None and (weight is None or bias.dtype != dtype):
        return None
    if weight is not None and weight.dim() > 1:
        return None
    other = (0, 0) if residual is None else _rows(residual)
    if other is None or (residual is not None and residual.dtype != dtype):
        return None
    out = torch.empty(x.shape, dtype=dtype)
    h = None if residual is None else torch.empty(x.shape, dtype=dtype)
    kernel(8 * x.element_size())(
        threads_for(x.numel()),
        out.data_ptr(),
        0 if h is None else h.data_ptr(),
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        shape[0],
        x.shape[-1],
        shape[1],
        other[1],
        eps,
        offset,
    )
    return out if h is None else (out, h)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `naive.rms_norm`."""
    result = _norm(rms_norm_kernel, x, weight, None, eps, residual, weight_offset)
    return naive.rms_norm(x, weight, eps, residual, weight_offset) if result is None else result


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `naive.layer_norm`."""
    result = _norm(layer_norm_kernel, x, weight, bias, eps, residual, 0.0)
    return naive.layer_norm(x, weight, bias, eps, residual) if result is None else result


def _packed_heads(*tensors: Tensor) -> bool:
    """Whether the heads of a token are adjacent and the dtypes the same and compiled."""
    dtype = tensors[0].dtype
    return dtype in COMPILED and all(
        x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.dtype == dtype for x in tensors
    )


def rotary_embedding(
    query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See `naive.rotary_embedding`: in place."""
    if not _packed_heads(query, key) or not cos_sin.is_contiguous():
        return naive.rotary_embedding(query, key, positions, cos_sin, interleaved=interleaved)
    require("positions", positions, torch.int64)
    require("cos_sin", cos_sin, torch.float32)
    tokens, num_heads, head_size = query.shape
    rotary_write_kernel(8 * query.element_size(), interleaved)(
        threads_for(query.numel()),
        query.data_ptr(),
        key.data_ptr(),
        0,
        positions.data_ptr(),
        cos_sin.data_ptr(),
        0,
        0,
        0,
        query.stride(0),
        key.stride(0),
        0,
        tokens,
        num_heads,
        key.shape[1],
        head_size,
        0,
        cos_sin.shape[1],
        0,
    )
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
    refuse_float8("cpu", key_cache, value_cache)
    if not _packed_heads(query, key, value) or key_cache.dtype != key.dtype:
        rotary_embedding(query, key, positions, cos_sin, interleaved=interleaved)
        write_kv(key, value, key_cache, value_cache, slot_mapping)
        return query, key
    require("positions", positions, torch.int64)
    require("cos_sin", cos_sin, torch.float32)
    _require_cache(key, key_cache, value_cache, slot_mapping)
    tokens, num_heads, head_size = query.shape
    rotary_write_kernel(8 * query.element_size(), interleaved)(
        threads_for(query.numel()),
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        positions.data_ptr(),
        cos_sin.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slot_mapping.data_ptr(),
        query.stride(0),
        key.stride(0),
        value.stride(0),
        tokens,
        num_heads,
        key.shape[1],
        head_size,
        value.shape[2],
        cos_sin.shape[1],
        key_cache.shape[2],
    )
    return query, key


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See `naive.write_kv`."""
    refuse_float8("cpu", key_cache, value_cache)
    if not _packed_heads(key, value) or key_cache.dtype != key.dtype:
        naive.write_kv(key, value, key_cache, value_cache, slot_mapping)
        return
    _require_cache(key, key_cache, value_cache, slot_mapping)
    tokens, num_kv_heads, head_size = key.shape
    rotary_write_kernel(8 * key.element_size(), False)(
        threads_for(key.numel()),
        0,
        key.data_ptr(),
        value.data_ptr(),
        0,
        0,
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slot_mapping.data_ptr(),
        0,
        key.stride(0),
        value.stride(0),
        tokens,
        0,
        num_kv_heads,
        head_size,
        value.shape[2],
        0,
        key_cache.shape[2],
    )


def copy_blocks(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """See `naive.copy_blocks`: every cache in one call."""
    if not all(cache.is_contiguous() for cache in caches):
        naive.copy_blocks(caches, src, dst)
        return
    require("src", src, torch.int64)
    require("dst", dst, torch.int64)
    addresses = array.array("q", [cache.data_ptr() for cache in caches])
    sizes = array.array("q", [cache[0].nbytes for cache in caches])
    copy_blocks_kernel()(
        threads_for(sum(sizes) * src.shape[0] // 4),
        addresses.buffer_info()[0],
        sizes.buffer_info()[0],
        src.data_ptr(),
        dst.data_ptr(),
        len(caches),
        src.shape[0],
    )


def gated_activation(x: Tensor, kind: GatedKind) -> Tensor:
    """See `naive.gated_activation`."""
    form, shape = _SIGMOID_FORM.get(kind), _rows(x)
    if form is None or shape is None or x.dtype not in COMPILED:
        return naive.gated_activation(x, kind)
    features = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], features), dtype=x.dtype)
    # an exp is worth about eight copies
    threads = threads_for(8 * out.numel())
    gated_kernel(8 * x.element_size())(
        threads, out.data_ptr(), x.data_ptr(), shape[0], features, shape[1], *form
    )
    return out


def activation(x: Tensor, kind: ActivationKind) -> Tensor:
    """See `naive.activation`: torch's own operators round once too."""
    match kind:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh" | "gelu_new" | "gelu_fast":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square_()
    return naive.activation(x, kind)


def moe(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    routing: Routing,
    kind: ExpertKind,
) -> Tensor:
    """See `naive.moe`."""
    activate = experts.expert_activation(kind, gated_activation, activation)
    return experts.moe(x, router_logits, gate_up, down, routing, activate)
