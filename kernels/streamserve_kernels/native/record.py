"""Records a decoder's forward once, as the instructions of every later step.

What CUDA graphs are on a GPU: the forward runs with symbols in place of tensors, each kernel call
becomes an instruction with its addresses filled in, and from then on a step is one call into C,
without Python between two layers and without the interpreter lock. The recorder offers a backend's
functions, so that the one decoder there is serves both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamserve_kernels import huge_pages
from streamserve_kernels.adapters import AdapterRows
from streamserve_kernels.experts import expert_activation
from streamserve_kernels.float8 import refuse_float8
from streamserve_kernels.interface import ExpertKind, NotRecordableError, PackedLinear, QuantLinear
from streamserve_kernels.native.adapters import AdapterTable
from streamserve_kernels.native.by_head import NativeHeadsLinear
from streamserve_kernels.native.execute import Executable, double_bits
from streamserve_kernels.native.experts import ExpertProducts, Routes, route
from streamserve_kernels.native.layout import check_head_sizes
from streamserve_kernels.native.library import ACTIVATION_CODES, GATED_CODES, MAX_PLANS
from streamserve_kernels.native.product import NativeWeight, Product
from streamserve_kernels.native.record_memory import ProductMemory
from streamserve_kernels.native.record_recurrent import RecurrentRecorder
from streamserve_kernels.native.recorded import RecordedProgram
from streamserve_kernels.native.symbol import LOGITS, TOKENS, Index, Symbol, rows_kind
from streamserve_kernels.pool import pool
from streamserve_kernels.routing import Routing


class Recorder(RecurrentRecorder):
    """A backend whose functions take symbols and write down what is to be done.

    Steps of up to ``max_tokens`` tokens and ``max_logits`` rows that need logits. Whatever no
    instruction does raises ``NotRecordableError``.
    """

    name = "native recorder"

    def embedding(self, ids: Index, weight: Tensor | QuantLinear) -> Symbol:
        if ids.name not in ("input_ids", "positions"):
            raise NotRecordableError(f"an embedding of {ids.name}")
        if not isinstance(weight, Tensor):
            return self._quantised_embedding(ids, weight)
        _require_bfloat16(weight)
        out = self._new(TOKENS, weight.shape[1])
        self._add(
            "embedding",
            out.address,
            self._address(weight),
            weight.shape[1],
            int(ids.name == "positions"),
            ids.offset,
            weight.shape[0],
        )
        return out

    def _quantised_embedding(self, ids: Index, table: QuantLinear) -> Symbol:
        if ids.name != "input_ids" or ids.offset or not isinstance(table, NativeWeight):
            raise NotRecordableError(f"an embedding of {ids.name} by {type(table).__name__}")
        out = self._new(TOKENS, table.in_features)
        self.instructions.append(table.embedding(out.address))
        self.keep.append(table)
        return out

    def gather(self, x: Symbol) -> Symbol:
        """The rows of x that need logits."""
        out = self._new(LOGITS, *x.tail)
        self._add("gather_rows", out.address, x.address, x.width, x.stride)
        return out

    def _norm(
        self,
        operation: str,
        x: Symbol,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Symbol | None,
        offset: float,
    ) -> Symbol | tuple[Symbol, Symbol]:
        out = self._new(x.rows, *x.tail)
        total = None if residual is None else self._new(x.rows, *x.tail)
        if residual is not None and not residual.is_dense:
            raise NotRecordableError("a residual with gaps between its rows")
        _require_bfloat16(*(tensor for tensor in (weight, bias) if tensor is not None))
        group = x.width // x.tail[-1]
        self._add(
            operation,
            out.address,
            0 if total is None else total.address,
            x.address,
            0 if residual is None else residual.address,
            self._address(weight),
            self._address(bias),
            x.tail[-1],
            double_bits(eps),
            double_bits(offset),
            rows_kind(x.rows),
            group,
            x.stride,
            out.stride,
            x.tail[-1] if weight is not None and weight.dim() == 2 else 0,
        )
        return out if total is None else (out, total)

    def rms_norm(
        self,
        x: Symbol,
        weight: Tensor,
        eps: float,
        residual: Symbol | None = None,
        weight_offset: float = 0.0,
    ) -> Symbol | tuple[Symbol, Symbol]:
        return self._norm("rms_norm", x, weight, None, eps, residual, weight_offset)

    def layer_norm(
        self,
        x: Symbol,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Symbol | None = None,
    ) -> Symbol | tuple[Symbol, Symbol]:
        return self._norm("layer_norm", x, weight, bias, eps, residual, 0.0)

    def rotary_write_kv(
        self,
        query: Symbol,
        key: Symbol,
        value: Symbol,
        positions: Index,
        cos_sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Index,
        *,
        interleaved: bool,
    ) -> tuple[Symbol, Symbol]:
        self._rotary_write(query, key, value, cos_sin, key_cache, value_cache, interleaved)
        return query, key

    def rotary_embedding(
        self, query: Symbol, key: Symbol, positions: Index, cos_sin: Tensor, *, interleaved: bool
    ) -> tuple[Symbol, Symbol]:
        self._rotary_write(query, key, key, cos_sin, None, None, interleaved)
        return query, key

    def write_kv(
        self,
        key: Symbol,
        value: Symbol,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Index,
    ) -> None:
        self._rotary_write(key, key, value, None, key_cache, value_cache, False)

    def _rotary_write(
        self,
        query: Symbol,
        key: Symbol,
        value: Symbol,
        cos_sin: Tensor | None,
        key_cache: Tensor | None,
        value_cache: Tensor | None,
        interleaved: bool,
    ) -> None:
        if key_cache is not None and value_cache is not None:
            refuse_float8("native", key_cache, value_cache)
        turns = cos_sin is not None
        self._add(
            "rotary_write",
            query.address if turns else 0,
            key.address,
            value.address,
            self._address(cos_sin),
            self._address(key_cache),
            self._address(value_cache),
            query.stride,
            key.stride,
            value.stride,
            query.tail[0] if turns else 0,
            key.tail[0],
            key.tail[1],
            value.tail[1],
            0 if cos_sin is None else cos_sin.shape[1],
            0 if key_cache is None else key_cache.shape[2],
            int(interleaved),
        )

    def paged_attention(
        self,
        query: Symbol,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Index,
        seq_lens: Index,
        query_start_loc: Index,
        *,
        scale: float,
        window: int | None = None,
        alibi_slopes: Tensor | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
        prefix_groups: None = None,
        max_query_len: int | None = None,
    ) -> Symbol:
        num_kv_heads, block_size, head_size = key_cache.shape[1:]
        value_size = value_cache.shape[3]
        check_head_sizes(head_size, value_size, block_size)
        sizes = (query.tail[0], num_kv_heads, value_size, block_size)
        had_window, had_blocks = self.attentions.get(sizes, (False, key_cache.shape[0]))
        # A step's blocks must be in every layer's cache.
        num_blocks = min(had_blocks, key_cache.shape[0], value_cache.shape[0])
        self.attentions[sizes] = (had_window or window is not None, num_blocks)
        if len(self.attentions) > MAX_PLANS:
            raise NotRecordableError(f"attention of more than {MAX_PLANS} shapes")
        out = self._new(TOKENS, query.tail[0], value_size)
        args = (
            out.address,
            query.address,
            query.stride,
            self._address(key_cache),
            self._address(value_cache),
            query.tail[0],
            num_kv_heads,
            head_size,
            value_size,
            block_size,
            double_bits(scale),
            window or 0,
            self._address(None if alibi_slopes is None else alibi_slopes.float()),
            double_bits(soft_cap or 0.0),
            self._address(None if sinks is None else sinks.float()),
            list(self.attentions).index(sizes),
        )
        self._add("attend", *args)
        self._add("attend_merge", *args)
        return out

    def gated_activation(self, x: Symbol, kind: str) -> Symbol:
        out = self._new(x.rows, x.width // 2)
        code, rows = GATED_CODES[kind], rows_kind(x.rows)
        self._add("gated", out.address, x.address, out.width, code, rows, x.stride)
        return out

    def activation(self, x: Symbol, kind: str) -> Symbol:
        out = self._new(x.rows, x.width)
        code = ACTIVATION_CODES[kind]
        rows = rows_kind(x.rows)
        self._add("activation", out.address, x.address, out.width, code, rows, x.stride)
        return out

    def linear(self, x: Symbol, packed: Any) -> Symbol:
        out = self._new(x.rows, packed.out_features)
        self._product(x, packed, out.address)
        return out

    def by_head(self, x: Symbol, packed: NativeHeadsLinear) -> Symbol:
        """See `naive.prepare_by_head`."""
        num_passed = x.tail[1] - packed.in_features
        if x.rows != TOKENS or num_passed < 0 or x.stride % 2:
            raise NotRecordableError("a product by heads of other rows than the step's")
        out = self._new(TOKENS, x.tail[0], num_passed + packed.out_features)
        self.instructions.append(packed.instruction(out.address, x.address, x.stride, num_passed))
        self.keep.append(packed)
        return out

    def _product(self, x: Symbol, packed: Any, y: int, **options: int) -> None:
        """X times a weight; `options` are fields of `Product`."""
        kind, y_stride = rows_kind(x.rows), packed.out_features
        product = Product(y, x.address, x.width, y_stride, x.stride, kind, **options)
        if not isinstance(packed, NativeWeight):
            raise NotRecordableError(f"a product with {type(packed).__name__}")
        self.keep.append(packed)
        self.instructions += packed.instructions(product, ProductMemory(self, x.rows))

    def add_adapters(
        self, y: Symbol, x: Symbol, table: AdapterTable, rows: AdapterRows | None
    ) -> Symbol:
        """Whose the rows are a step says when it runs."""
        if not y.is_dense:
            raise NotRecordableError("adapters of rows with gaps")
        if self._slots is None:
            sizes = (self.max_tokens, self.max_logits)
            tokens, logits = (torch.full((size,), -1, dtype=torch.int32) for size in sizes)
            self._slots = (tokens, logits)
        low = self._low.get(table.max_rank)
        if low is None:
            shape = (max(self.max_tokens, self.max_logits), table.max_rank)
            low = self._low[table.max_rank] = torch.zeros(shape, dtype=torch.bfloat16)
            self.keep.append(low)
        kind = rows_kind(x.rows)
        slots = self._slots[kind].data_ptr()
        args = table.arguments(slots, x.address, x.stride, low.data_ptr(), y.address, kind)
        self.keep.append(table)
        self._add("adapt_down", *args)
        self._add("adapt_up", *args)
        return y

    def add(self, a: Symbol, b: Symbol) -> Symbol:
        if not (a.is_dense and b.is_dense):
            raise NotRecordableError("a sum of rows with gaps")
        out = self._new(a.rows, *a.tail)
        self._add("add", out.address, a.address, b.address, a.width, rows_kind(a.rows))
        return out

    def scale(self, x: Symbol, factor: float) -> Symbol:
        out = self._new(x.rows, *x.tail)
        self._scale(out, x, factor)
        return out

    def side_by_side(self, parts: Sequence[Symbol]) -> Symbol:
        widths = [part.width for part in parts]
        out = self._new(parts[0].rows, sum(widths))
        for place, part in zip(out.split_with_sizes(widths, 1), parts, strict=True):
            self._scale(place, part, 1.0)
        return out

    def clip(self, x: Symbol, limit: float) -> None:
        """In place."""
        self._scale(x, x, 1.0, limit)

    def _scale(self, out: Symbol, x: Symbol, factor: float, limit: float = 0.0) -> None:
        self._add(
            "scale",
            out.address,
            x.address,
            x.stride,
            x.width,
            rows_kind(x.rows),
            double_bits(factor),
            out.stride,
            double_bits(limit),
        )

    def multiply(self, a: Symbol, b: Symbol) -> Symbol:
        """Element by element; or each of b's by a run of a's, where b's last dimensions are 1."""
        held = tuple(b.tail)
        while held and held[-1] == 1:
            held = held[:-1]
        if len(a.tail) != len(b.tail) or held != a.tail[: len(held)]:
            raise NotRecordableError(f"a product of {a.shape} and {b.shape}")
        out, rows = self._new(a.rows, *a.tail), rows_kind(a.rows)
        factors = (b.address, b.stride, a.width // b.width)
        self._add("multiply", out.address, a.address, a.stride, a.width, rows, *factors)
        return out

    def multiply_columns(self, a: Symbol, factors: Tensor) -> Symbol:
        """Each row by the same factors [N]."""
        if a.tail != tuple(factors.shape):
            raise NotRecordableError(f"a product of {a.shape} and {tuple(factors.shape)}")
        _require_bfloat16(factors)
        out, rows = self._new(a.rows, *a.tail), rows_kind(a.rows)
        row = (self._address(factors), 0, 1)
        self._add("multiply", out.address, a.address, a.stride, a.width, rows, *row)
        return out

    def moe(
        self,
        x: Symbol,
        router_logits: Symbol,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
        routing: Routing,
        kind: ExpertKind,
    ) -> Symbol:
        routes = Routes(self._most_rows(x.rows), len(down), routing.top_k, x.rows)
        if not router_logits.is_dense:
            raise NotRecordableError("a router's logits with gaps between their rows")
        self.instructions.append(route(routes, router_logits.address, routing))
        self.keep.append(routing)
        self._add("order_pairs", routes.address)
        rows = self._new(routes.pairs, x.width)
        self._add("gather_pairs", routes.address, rows.address, x.address, x.width, x.stride)
        activate = expert_activation(kind, self.gated_activation, self.activation)
        hidden = activate(self._expert_products(rows, routes, gate_up))
        parts = self._expert_products(hidden, routes, down)
        out = self._new(x.rows, parts.width)
        self._add("combine_pairs", routes.address, out.address, parts.address, parts.width)
        return out

    def _expert_products(
        self, x: Symbol, routes: Routes, experts: Sequence[PackedLinear]
    ) -> Symbol:
        products = ExpertProducts(experts)
        out = self._new(x.rows, products.out_features)
        memory = ProductMemory(self, x.rows)
        self.instructions += products.instructions(routes, out.address, x.address, memory)
        self.keep += experts, products, routes
        return out

    def add_shared_experts(self, chosen: Symbol, x: Symbol, gate: Tensor, shared: Symbol) -> Symbol:
        if not (chosen.is_dense and shared.is_dense and x.is_dense):
            raise NotRecordableError("a sum of rows with gaps")
        _require_bfloat16(gate)
        out = self._new(chosen.rows, *chosen.tail)
        self._add(
            "add_shared",
            out.address,
            chosen.address,
            shared.address,
            x.address,
            self._address(gate),
            out.width,
            x.width,
            rows_kind(x.rows),
        )
        return out

    def finish(
        self,
        x: Symbol,
        head: Any,
        scale: float,
        soft_cap: float | None,
        tapped: Sequence[Symbol] = (),
    ) -> RecordedProgram:
        """Ends with the head's product in float32, and each row's arg-max."""
        if x.rows != LOGITS:
            raise NotRecordableError("hidden states of other rows than those that need logits")
        logits = huge_pages.zeros((self.max_logits, head.out_features), torch.float32)
        huge_pages.touch(logits)
        token_ids = torch.zeros(self.max_logits, dtype=torch.int64)
        best = torch.zeros(pool().threads() * self.max_logits, dtype=torch.int64)
        self.keep.append(best)
        self._product(
            x,
            head,
            logits.data_ptr(),
            y_float32=1,
            best=best.data_ptr(),
            scale=double_bits(scale),
            cap=double_bits(soft_cap or 0.0),
        )
        self._add("argmax", token_ids.data_ptr(), best.data_ptr())
        attentions = [(*sizes, int(w), n) for sizes, (w, n) in self.attentions.items()]
        executable = Executable(len(self.instructions), attentions)
        executable.set(self.instructions)
        return RecordedProgram(
            executable,
            self.max_tokens,
            self._memory_of(x),
            logits,
            token_ids,
            self.keep,
            self._slots,
            [self._memory_of(symbol) for symbol in tapped],
            self._given,
        )


def _require_bfloat16(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16:
            raise NotRecordableError(f"a weight of {tensor.dtype}")
