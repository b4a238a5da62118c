"""Mixtures of experts: a few instructions multiply all experts that somebody chose.

The C side is `src/experts.c`. A *pair* is a row and one of its experts; pairs are ordered by
expert. What cannot be multiplied this way is left to `streamserve_kernels.experts`, one expert at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from streamserve_kernels import experts as one_by_one
from streamserve_kernels.interface import GatedKind, NotRecordableError, PackedLinear
from streamserve_kernels.native.execute import eager, pack_instructions, pack_step
from streamserve_kernels.native.linear import NativeLinear
from streamserve_kernels.native.ops import gated_activation
from streamserve_kernels.native.quant_linear import NativeQuantLinear, Scratch
from streamserve_kernels.native.stored import NativeStackedLinear
from streamserve_kernels.native.stored_linear import GroupSums, LookupLinear
from streamserve_kernels.native.symbol import TOKENS, pairs, rows_kind
from streamserve_kernels.pool import pool

_MAX_EXPERTS = 1024  # MAX_EXPERTS of experts.h
_SLICE = -1  # SS_SLICE: the rows of one expert
_MULTIPLIED = (NativeLinear, NativeQuantLinear, LookupLinear, NativeStackedLinear)
_Y, _X = 0, 1  # of the arguments of a product

Instruction = tuple[str, tuple[int, ...]]
Work = Scratch | GroupSums
Memory = Callable[[type[Work], int], Work]
"""Gives memory of a kind for the rows of a step, of so many groups of inputs."""


class _Made(NamedTuple):
    """By what operation it is made, and which of a product's arguments tell of it."""

    operation: str
    work: int
    rows_kind: int


_MADE: dict[type[Work], _Made] = {
    Scratch: _Made("quantise", 6, 5),
    GroupSums: _Made("stored_sums", 10, 3),
}


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


class ExpertProducts:
    """The products of a layer's experts, [N, K] each, with rows of pairs.

    Raises NotRecordableError for weights that these instructions do not multiply, or of several
    kinds. What `instructions` gives reads this object: it has one user at a time.
    """

    def __init__(self, experts: Sequence[PackedLinear]) -> None:
        if len(experts) > _MAX_EXPERTS:
            raise NotRecordableError(f"{len(experts)} experts")
        self.out_features = experts[0].out_features
        stacks = [e.parts if isinstance(e, NativeStackedLinear) else (e,) for e in experts]
        if len({len(stack) for stack in stacks}) > 1:
            raise NotRecordableError("experts of several kinds")
        self._parts = [_Part(part, self.out_features) for part in zip(*stacks, strict=True)]

    def instructions(
        self, routes: Routes, y: int, x: int, memory: Memory
    ) -> tuple[list[Instruction], list[object]]:
        """From rows [P, K] at x to rows [P, N] at y; and what is to be kept while they run."""
        instructions: list[Instruction] = []
        keep: list[object] = [self, routes]
        for part in self._parts:
            work = None if part.work_of is None else memory(*part.work_of)
            instructions += part.instructions(routes, y, x, work)
            keep.append(work)
            y += 2 * part.out_features
        return instructions, keep


class _Part:
    """A weight of each expert, all of one kind: columns of the experts' outputs.

    Holds where the weights lie, not the weights.
    """

    def __init__(self, experts: Sequence[PackedLinear], y_stride: int) -> None:
        self.out_features = experts[0].out_features
        kinds = {(type(e), e.in_features, e.out_features, _work_of(e)) for e in experts}
        if len(kinds) > 1:
            raise NotRecordableError("experts of several kinds")
        self.work_of = _work_of(experts[0])
        self._products = pack_instructions([_product(e, y_stride, _SLICE) for e in experts])
        self._first = _product(experts[0], y_stride, 0)[1]

    def instructions(self, routes: Routes, y: int, x: int, work: Work | None) -> list[Instruction]:
        # The first number of an instruction is its operation's.
        self._products[:, 1 + _Y], self._products[:, 1 + _X] = y, x
        experts = ("experts", (routes.address, self._products.data_ptr()))
        if work is None:
            return [experts]
        made = _MADE[type(work)]
        self._products[:, 1 + made.work] = work.address
        args = list(self._first)
        args[_X], args[made.work] = x, work.address
        args[made.rows_kind] = rows_kind(routes.pairs)
        return [(made.operation, tuple(args)), experts]


def _work_of(expert: PackedLinear) -> tuple[type[Work], int] | None:
    """What is made of the rows before the product: its memory's kind, and the groups of inputs."""
    if isinstance(expert, NativeQuantLinear):
        return Scratch, expert.groups
    if isinstance(expert, LookupLinear) and expert.has_offsets:
        return GroupSums, expert.groups
    return None


def _product(expert: PackedLinear, y_stride: int, kind: int) -> Instruction:
    """With rows of a kind, whose addresses are still to be filled in."""
    width, is_whole = expert.in_features, expert.out_features == y_stride
    if isinstance(expert, LookupLinear) and not expert.inputs_address:
        args = expert.arguments(0, 0, width, None, None, rows_kind=kind, y_stride=y_stride)
        return expert.operation, args
    if isinstance(expert, NativeQuantLinear) and is_whole:
        return "linear_quant", expert.arguments(0, 0, width, None, None, rows_kind=kind)
    if isinstance(expert, NativeLinear) and is_whole and width % 2 == 0:
        return "linear", expert.arguments(0, 0, width, rows_kind=kind)
    raise NotRecordableError(f"experts of {type(expert).__name__}")


# --- on tensors -----------------------------------------------------------------------------------

_known: WeakKeyDictionary[PackedLinear, ExpertProducts | None] = WeakKeyDictionary()


def _products_of(experts: Sequence[PackedLinear], x: Tensor, top_k: int) -> ExpertProducts | None:
    """Those of a layer are found by its first expert; None: they are not multiplied here."""
    first = experts[0]
    if x.dtype != torch.bfloat16 or not isinstance(first, _MULTIPLIED):
        return None
    if isinstance(first, NativeLinear) and first.few_rows is not None:
        # The matrix units are faster from so many rows of an expert on.
        if x.shape[0] * top_k > first.few_rows * len(experts):
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
    top_k: int,
    renormalise: bool,
    kind: GatedKind,
) -> Tensor:
    """See `naive.moe`."""
    first, last = _products_of(gate_up, x, top_k), _products_of(down, x, top_k)
    if first is None or last is None or router_logits.dtype != torch.bfloat16:
        return one_by_one.moe(
            x, router_logits, gate_up, down, top_k, renormalise, kind, gated_activation
        )
    logits = router_logits.contiguous()
    routes = Routes(x.shape[0], len(down), top_k)
    route = ("route", (routes.address, logits.data_ptr(), int(renormalise)))
    return _multiply(x, routes, [route], first, last, partial(gated_activation, kind=kind))


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
    _run(x.shape[0], [("add_shared", args)])
    return out


def _multiply(
    x: Tensor,
    routes: Routes,
    route: list[Instruction],
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

    def memory(kind: type[Work], groups: int) -> Work:
        return kind(num_pairs, groups)

    up, keep = first.instructions(routes, hidden.data_ptr(), rows.data_ptr(), memory)
    gather = (routes.address, rows.data_ptr(), x.data_ptr(), width, x.stride(0))
    _run(tokens, [*route, ("order_pairs", (routes.address,)), ("gather_pairs", gather), *up])
    hidden = activate(hidden).contiguous()
    down, kept = last.instructions(routes, parts.data_ptr(), hidden.data_ptr(), memory)
    combine = (routes.address, out.data_ptr(), parts.data_ptr(), last.out_features)
    _run(tokens, [*down, ("combine_pairs", combine)])
    del keep, kept
    return out


def _run(tokens: int, instructions: list[Instruction]) -> None:
    executable = eager(len(instructions))
    for index, (operation, args) in enumerate(instructions):
        executable.set(index, operation, *args)
    executable.run(pack_step(tokens), pool().threads())
