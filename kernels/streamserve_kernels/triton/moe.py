"""Mixtures of experts without asking the device how many tokens an expert has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from streamserve_kernels.interface import ExpertKind, GatedKind, PackedLinear
from streamserve_kernels.routing import Routing
from streamserve_kernels.triton.elementwise import GATED_KINDS, activation, gated_activation
from streamserve_kernels.triton.linear import DenseLinear
from streamserve_kernels.triton.moe_kernels import (
    combine_kernel,
    count_kernel,
    grouped_product_kernel,
    order_kernel,
    route_kernel,
)
from streamserve_kernels.triton.runtime import INTERPRETED, forget_with

_SCANNED = 1024  # pairs at a time, when they are counted and ordered
_COMBINED = 1024  # outputs of a program of the last sum


class _Tile(NamedTuple):
    """Sizes of the grouped product: of both products of an expert, then the widths of each."""

    block_m: int
    block_k: int
    gated_n: int  # twice as many rows of the weight
    down_n: int
    num_warps: int
    stages: int


# By the rows that an expert has on average. The first reads each weight once for a row or two.
_TILES = (
    _Tile(16, 128, 32, 32, 4, 4),
    _Tile(16, 128, 32, 64, 4, 4),
    _Tile(64, 64, 64, 128, 4, 4),
    _Tile(128, 64, 64, 128, 8, 3),
)
# Of weights whose rows do not begin at 16 bytes: every number has an address of its own, and those
# of twice as many inputs do not fit into registers.
_ODD_TILES = (
    *_TILES[:2],
    _Tile(64, 32, 64, 64, 4, 3),
    _Tile(128, 32, 64, 128, 8, 3),
)
# Float32 is not what these kernels are for: one that is right, and fits.
_FLOAT32 = _Tile(16, 32, 32, 32, 4, 2)


class _Table(NamedTuple):
    """Where an experts' layer has its weights: addresses [E] int64 on the device."""

    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    aligned: bool


Activate = Callable[[Tensor], Tensor]
_tables: dict[tuple[int, ...], _Table] = {}


def moe(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    routing: Routing,
    kind: ExpertKind,
) -> Tensor:
    """See `naive.moe`. Quantised experts see every token: see `_one_by_one`.

    The first call with a layer's weights tells the device where they are: not inside a capture.
    """
    if kind not in (*GATED_KINDS, "relu2"):
        raise ValueError(f"activation kind {kind!r} is not known")
    if x.shape[0] == 0:
        return torch.empty_like(x)
    chosen, weights = _route(router_logits, routing)
    by_kind = partial(activation, kind=kind) if kind == "relu2" else kind
    return _multiply(x, chosen, weights, gate_up, down, by_kind)


def chosen_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    activate: Activate,
) -> Tensor:
    """See `naive.chosen_experts`, and what `moe` says of quantised experts and captures."""
    if x.shape[0] == 0:
        return torch.empty_like(x)
    return _multiply(x, chosen.contiguous(), weights.contiguous(), up, down, activate)


def _multiply(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    activation: GatedKind | Activate,
) -> Tensor:
    experts, last = _dense(up, x.dtype), _dense(down, x.dtype)
    if experts is None or last is None:
        if isinstance(activation, str):
            activation = partial(gated_activation, kind=activation)
        return _one_by_one(x, chosen, weights, up, down, activation)
    return _grouped(x, chosen, weights, experts, last, activation)


def _route(router_logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Logits [T, E] -> experts [T, top_k] int32 and their weights, float32."""
    (tokens, num_experts), top_k = router_logits.shape, routing.top_k
    correction, expert_scales = routing.correction, routing.expert_scales
    if router_logits.stride(1) != 1:
        router_logits = router_logits.contiguous()
    chosen = torch.empty(tokens, top_k, dtype=torch.int32, device=router_logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=router_logits.device)
    route_kernel[(tokens,)](
        router_logits,
        chosen,
        weights,
        router_logits if correction is None else correction,  # any address, of what is not read
        router_logits if expert_scales is None else expert_scales,
        router_logits.stride(0),
        routing.eps,
        routing.scale,
        E=num_experts,
        TOP_K=top_k,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_K=triton.next_power_of_2(top_k),
        RENORMALISE=routing.renormalise,
        SIGMOID=routing.scoring == "sigmoid",
        CORRECTED=correction is not None,
        OWN_SCALES=expert_scales is not None,
        GROUPS=routing.num_groups,
        TOP_GROUPS=routing.top_groups,
        VOTES=routing.group_votes,
        BLOCK_G=triton.next_power_of_2(routing.num_groups),
        num_warps=1,
    )
    return chosen, weights


def _dense(experts: Sequence[PackedLinear], dtype: torch.dtype) -> list[DenseLinear] | None:
    """The experts, if all of them are plain weights of this dtype."""
    dense = [expert for expert in experts if isinstance(expert, DenseLinear)]
    return dense if len(dense) == len(experts) and dense[0].weight.dtype == dtype else None


def _table(up: list[DenseLinear], down: list[DenseLinear]) -> _Table:
    """A table is its addresses, so it is found by them."""
    both = up + down
    weights = tuple(expert.weight.data_ptr() for expert in both)
    biases = tuple(0 if expert.bias is None else expert.bias.data_ptr() for expert in both)
    key = weights + biases
    found = _tables.get(key)
    if found is None:
        for experts in (up, down):
            kinds = {(e.weight.shape, e.weight.dtype, e.bias is None) for e in experts}
            if len(kinds) != 1:
                raise ValueError(f"experts of a layer must be alike, these are {len(kinds)} kinds")
        addresses = torch.tensor(key, dtype=torch.int64).view(4, -1).to(up[0].device)
        aligned = all(address % 16 == 0 for address in weights)
        found = _Table(addresses[0], addresses[2], addresses[1], addresses[3], aligned)
        _tables[key] = found
        forget_with(up[0].weight, _tables, key)
    return found


def _grouped(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: list[DenseLinear],
    down: list[DenseLinear],
    activation: GatedKind | Activate,
) -> Tensor:
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, top_k = chosen.shape
    num_experts, inner, hidden = len(up), down[0].in_features, down[0].out_features
    pairs = tokens * top_k
    is_sorted = pairs > num_experts
    table = _table(up, down)
    is_odd = not table.aligned or inner % 16 != 0 or hidden % 16 != 0
    tile = _tile(pairs, num_experts, x.dtype, is_odd)
    order, tile_experts = chosen, chosen
    if is_sorted:
        order, tile_experts = _order(chosen, num_experts, tile.block_m)

    def product(
        a: Tensor,
        addresses: tuple[Tensor, Tensor],
        width: int,
        block_n: int,
        rows_per_x: int,
        has_bias: bool,
        kind: int = -1,
    ) -> Tensor:
        y = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
        num_tiles = tile_experts.numel()
        grouped_product_kernel[(num_tiles, triton.cdiv(width, block_n))](
            a,
            *addresses,
            order,
            tile_experts,
            y,
            a.stride(0),
            pairs,
            width,
            a.shape[1],
            ROWS_PER_X=rows_per_x,
            KIND=kind,
            HAS_BIAS=has_bias,
            SORTED=is_sorted,
            ALIGNED=table.aligned,
            BLOCK_M=tile.block_m,
            BLOCK_N=block_n,
            BLOCK_K=tile.block_k,
            STAGES=tile.stages,
            INTERPRETED=INTERPRETED,
            num_warps=tile.num_warps,
        )
        return y

    first = table.up, table.up_bias
    has_bias = up[0].bias is not None
    if isinstance(activation, str):
        kind = GATED_KINDS[activation]
        acted = product(x, first, inner, tile.gated_n, top_k, has_bias, kind)
    else:
        hidden_rows = product(x, first, up[0].out_features, tile.down_n, top_k, has_bias)
        acted = activation(hidden_rows).contiguous()
    has_bias = down[0].bias is not None
    parts = product(acted, (table.down, table.down_bias), hidden, tile.down_n, 1, has_bias)
    y = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    combine_kernel[(tokens, triton.cdiv(hidden, _COMBINED))](
        parts, weights, y, hidden, TOP_K=top_k, BLOCK=_COMBINED, num_warps=4
    )
    return y


def _tile(pairs: int, num_experts: int, dtype: torch.dtype, is_odd: bool) -> _Tile:
    if dtype == torch.float32:
        return _FLOAT32
    tiles = _ODD_TILES if is_odd else _TILES
    if pairs <= num_experts:
        return tiles[0]
    rows = pairs / num_experts
    return tiles[1] if rows <= 16 else tiles[2] if rows <= 96 else tiles[3]


def _order(chosen: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Pairs expert by expert in whole tiles, and the expert of each tile: see `moe_kernels`."""
    pairs = chosen.numel()
    # Each expert has at most one tile that is not full.
    tiles = pairs // block_m + min(num_experts, pairs)
    order, tile_experts, counts = (
        torch.empty(size, dtype=torch.int32, device=chosen.device)
        for size in (tiles * block_m, tiles, num_experts)
    )
    count_kernel[(num_experts,)](chosen, counts, pairs, BLOCK=_SCANNED, num_warps=4)
    order_kernel[(num_experts,)](
        chosen,
        counts,
        order,
        tile_experts,
        pairs,
        tiles,
        E=num_experts,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_M=block_m,
        BLOCK=_SCANNED,
        num_warps=4,
    )
    return order, tile_experts


def _one_by_one(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    activate: Activate,
) -> Tensor:
    """Every expert multiplies every token, and those that did not choose it take nothing of it.

    The host cannot know who chose whom: E / top_k times the work, by the ordinary products.
    """
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(len(up)):
        picked = chosen == e
        share = torch.where(picked, weights, 0.0).sum(-1, keepdim=True)
        part = down[e](activate(up[e](x))).float()
        total += torch.where(picked.any(-1, keepdim=True), share * part, 0.0)
    return total.to(x.dtype)
