"""Mixtures of experts: a few instructions multiply all experts that somebody chose.

The C side is `src/experts.c`. A *pair* is a row and one of its experts; pairs are ordered by
expert. What cannot be multiplied this way is left to `streamserve_kernels.experts`, one expert at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from streamserve_kernels import experts as one_by_one
from streamserve_kernels.interface import ExpertKind, NotRecordableError, PackedLinear
from streamserve_kernels.native.execute import (
    Instruction,
    double_bits,
    pack_instructions,
    pack_step,
    run_at_once,
)
from streamserve_kernels.native.linear import NativeLinear
from streamserve_kernels.native.ops import activation, gated_activation
from streamserve_kernels.native.product import HeldMemory, Memory, NativeWeight, Product
from streamserve_kernels.native.symbol import TOKENS, pairs, rows_kind
from streamserve_kernels.pool import pool
from streamserve_kernels.routing import Routing

_MAX_EXPERTS = 1024  # MAX_EXPERTS of experts.h
_SLICE = -1  # SS_SLICE: the rows of one expert
_HEAD = len(Product._fields)


class Routes:
    """Who goes to which expert: memory for up to ``max_rows`` rows of one layer.

    ``rows`` is the first dimension of the symbols that they are of. The layers of a program do not
    share this: a thread that comes late to an instruction must find there what the others found.
    """

    def __init__(self, max_rows: int, num_experts: int, top_k: int, rows: int = TOKENS) -> None:
        self.pairs = pairs(rows, top_k)
        self.chosen = torch.empty(max_rows, top_k, dtype=torch.int32)
        self.weights = torch.empty(max_rows, top_k)
        sizes = (num_experts + 1, num_experts + 1, max_rows * top_k, max_rows * top_k)
        self._ordered = [torch.empty(size, dtype=torch.int32) for size in sizes]
        memory = (self.chosen, self.weights, *self._ordered)
        fields = (num_experts, top_k, rows_kind(rows), *(tensor.data_ptr() for tensor in memory))
        self._descriptor = torch.tensor(fields, dtype=torch.int64)
        self.address = self._descriptor.data_ptr()


def route(routes: Routes, logits: int, routing: Routing) -> Instruction:
    """The choice by rows of logits [R, E], which lie together."""
    correction, expert_scales = routing.correction, routing.expert_scales
    args = (
        routes.address,
        logits,
        int(routing.renormalise),
        int(routing.scoring == "sigmoid"),
        0 if correction is None else correction.data_ptr(),
        routing.num_groups,
        routing.top_groups,
        double_bits(routing.eps),
        double_bits(routing.scale),
        routing.group_votes,
        0 if expert_scales is None else expert_scales.data_ptr(),
    )
    return "route", args


class _NoMemory:
    """What an expert asks for shows in the fields, so that kinds of experts can be compared."""

    def work(self, row_bytes: int) -> tuple[int, int, int, int]:
        return 0, 0, row_bytes, 0

    def rows(self, width: int) -> int:
        return 0


class ExpertProducts:
    """The products of a layer's experts, [N, K] each, with rows of pairs.

    Holds where the weights lie, not the weights. Raises NotRecordableError for weights that these
    instructions do not multiply, or of several kinds. What `instructions` gives reads this object.
    """

    def __init__(self, experts: Sequence[PackedLinear]) -> None:
        if len(experts) > _MAX_EXPERTS:
            raise NotRecordableError(f"{len(experts)} experts")
        self.out_features = experts[0].out_features
        self._first = ref(experts[0])
        told = [_told(expert, 0, 0, _SLICE, _NoMemory()) for expert in experts]
        kinds = {tuple((name, args[:_HEAD]) for name, args in one) for one in told}
        if len(kinds) > 1:
            raise NotRecordableError("experts of several kinds")
        # What all tell alike is made of all rows at once; else there is one for each expert.
        self._own = [
            None if len(set(stage)) == 1 else pack_instructions(stage)
            for stage in zip(*told, strict=True)
        ]

    def instructions(self, routes: Routes, y: int, x: int, memory: Memory) -> list[Instruction]:
        """From rows [P, K] at x to rows [P, N] at y; `memory` is for P rows."""
        first = self._first()
        assert first is not None
        told = _told(first, y, x, rows_kind(routes.pairs), memory)
        found: list[Instruction] = []
        for (name, args), own in zip(told, self._own, strict=True):
            head = Product(*args[:_HEAD])._replace(done=0)  # other threads need what is made
            if own is None:
                found.append((name, (*head, *args[_HEAD:])))
            else:
                head = head._replace(rows_kind=_SLICE)
                found.append(("experts", (*head, routes.address, own.data_ptr())))
        return found


def _told(expert: PackedLinear, y: int, x: int, kind: int, memory: Memory) -> list[Instruction]:
    """What an expert [N, K] makes of rows of a kind that lie together, y as wide as its outputs."""
    if not isinstance(expert, NativeWeight):
        raise NotRecordableError(f"experts of {type(expert).__name__}")
    width = expert.in_features
    return expert.instructions(Product(y, x, width, expert.out_features, width, kind), memory)


# --- on tensors -----------------------------------------------------------------------------------

_known: WeakKeyDictionary[PackedLinear, ExpertProducts | None] = WeakKeyDictionary()


def _products_of(experts: Sequence[PackedLinear], x: Tensor, top_k: int) -> ExpertProducts | None:
    """Those of a layer are found by its first expert; None: they are not multiplied here."""
    first = experts[0]
    if x.dtype != torch.bfloat16:
        return None
    if isinstance(first, NativeLinear) and first.few_rows is not None:
        # The matrix units are faster from so many rows of an expert on.
        if x.shape[0] * top_k > first.few_rows * len(experts):
            return None
    if not isinstance(first, NativeWeight):
        return None
    if first not in _known:
        try:
            _known[first] = ExpertProducts(experts)
        except NotRecordableError:
            _known[first] = None
    return _known[first]


def moe(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    routing: Routing,
    kind: ExpertKind,
) -> Tensor:
    """See `naive.moe`."""
    activate = one_by_one.expert_activation(kind, gated_activation, activation)
    top_k = routing.top_k
    first, last = _products_of(gate_up, x, top_k), _products_of(down, x, top_k)
    if first is None or last is None or router_logits.dtype != torch.bfloat16:
        return one_by_one.moe(x, router_logits, gate_up, down, routing, activate)
    logits = router_logits.contiguous()
    routes = Routes(x.shape[0], len(down), top_k)
    return _multiply(
        x,
        routes,
        [route(routes, logits.data_ptr(), routing)],
        first,
        last,
        activate,
    )


def chosen_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """See `naive.chosen_experts`."""
    top_k = chosen.shape[1]
    first, last = _products_of(up, x, top_k), _products_of(down, x, top_k)
    if first is None or last is None:
        return one_by_one.chosen_experts(x, chosen, weights, up, down, activate)
    routes = Routes(x.shape[0], len(down), top_k)
    routes.chosen.copy_(chosen)
    routes.weights.copy_(weights)
    return _multiply(x, routes, [], first, last, activate)


def add_shared_experts(chosen: Tensor, x: Tensor, gate: Tensor, shared: Tensor) -> Tensor:
    """See `naive.add_shared_experts`; rounded once."""
    chosen, x, gate, shared = (tensor.contiguous() for tensor in (chosen, x, gate, shared))
    out = torch.empty_like(chosen)
    addresses = [tensor.data_ptr() for tensor in (out, chosen, shared, x)]
    args = (*addresses, gate.data_ptr(), out.shape[1], x.shape[1], 0)
    run_at_once([("add_shared", args)], pack_step(x.shape[0]), pool().threads())
    return out


def _multiply(
    x: Tensor,
    routes: Routes,
    chosen: list[Instruction],
    first: ExpertProducts,
    last: ExpertProducts,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    tokens, width = x.shape
    num_pairs = routes.chosen.numel()
    rows = torch.empty(num_pairs, width, dtype=torch.bfloat16)
    hidden = torch.empty(num_pairs, first.out_features, dtype=torch.bfloat16)
    parts = torch.empty(num_pairs, last.out_features, dtype=torch.bfloat16)
    out = torch.empty(tokens, last.out_features, dtype=torch.bfloat16)
    step, threads, memory = pack_step(tokens), pool().threads(), HeldMemory(num_pairs)
    up = first.instructions(routes, hidden.data_ptr(), rows.data_ptr(), memory)
    gather = (routes.address, rows.data_ptr(), x.data_ptr(), width, x.stride(0))
    order = [("order_pairs", (routes.address,)), ("gather_pairs", gather)]
    run_at_once([*chosen, *order, *up], step, threads)
    hidden = activate(hidden).contiguous()
    down = last.instructions(routes, parts.data_ptr(), hidden.data_ptr(), memory)
    combine = (routes.address, out.data_ptr(), parts.data_ptr(), last.out_features)
    run_at_once([*down, ("combine_pairs", combine)], step, threads)
    return out
