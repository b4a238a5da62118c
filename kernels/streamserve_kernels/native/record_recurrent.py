"""Layers with a state of constant size, as a recorded step has them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from streamserve_kernels.interface import NotRecordableError
from streamserve_kernels.native import recurrent
from streamserve_kernels.native.record_memory import RecorderMemory
from streamserve_kernels.native.recurrent import Rows
from streamserve_kernels.native.symbol import TOKENS, Index, Symbol, rows_kind


class RecurrentRecorder(RecorderMemory):
    """Whose states are where, a step says when it runs."""

    def causal_conv(
        self,
        x: Symbol,
        weight: Tensor,
        bias: Tensor | None,
        states: Tensor,
        step: Index,
        query_start_loc: Index,
        seq_lens: Index,
        *,
        activation: Literal["silu"] | None = None,
    ) -> Symbol:
        _require_tokens(x)
        out, taps = self._new(TOKENS, x.width), recurrent.packed_taps(weight)
        self.instructions.append(
            recurrent.convolution(_rows(out), _rows(x), taps, bias, states, activation)
        )
        self.keep += taps, bias, states
        return out

    def gated_delta_rule(
        self,
        qkv: Symbol,
        gates: Symbol,
        decay: Tensor,
        time_bias: Tensor,
        states: Tensor,
        step: Index,
        query_start_loc: Index,
        seq_lens: Index,
        *,
        num_key_heads: int,
    ) -> Symbol:
        _require_tokens(qkv, gates)
        out = self._new(TOKENS, states.shape[1] * states.shape[3])
        scales = self._scales_of(recurrent.scales_width(states, num_key_heads))
        self.instructions += recurrent.delta_rule(
            _rows(out), _rows(qkv), _rows(gates), decay, time_bias, states, num_key_heads, scales
        )
        self.keep += decay, time_bias, states, scales
        return out

    def state_space_scan(
        self,
        xbc: Symbol,
        dt: Symbol,
        decay: Tensor,
        time_bias: Tensor,
        skip: Tensor,
        states: Tensor,
        step: Index,
        query_start_loc: Index,
        seq_lens: Index,
        *,
        num_groups: int,
    ) -> Symbol:
        _require_tokens(xbc, dt)
        out = self._new(TOKENS, states.shape[1] * states.shape[3])
        times = self._scales_of(recurrent.times_width(states))
        self.instructions += recurrent.state_space(
            _rows(out), _rows(xbc), _rows(dt), decay, time_bias, skip, states, num_groups, times
        )
        self.keep += decay, time_bias, skip, states, times
        return out

    def _scales_of(self, width: int) -> Tensor:
        """Layers of a kind share them: the next one writes when this one's rule is through."""
        if width not in self._scales:
            self._scales[width] = torch.zeros(self.max_tokens, width)
        return self._scales[width]

    def gated_rms_norm(self, x: Symbol, gate: Symbol, weight: Tensor, eps: float) -> Symbol:
        out, kind = self._new(x.rows, *x.tail), rows_kind(x.rows)
        self.instructions.append(
            recurrent.gated_norm(_rows(out), _rows(x), _rows(gate), weight, eps, kind)
        )
        self.keep.append(weight)
        return out

    def norm_of_gated(
        self, x: Symbol, gate: Symbol, weight: Tensor, eps: float, group_size: int
    ) -> Symbol:
        out, kind = self._new(x.rows, *x.tail), rows_kind(x.rows)
        self.instructions.append(
            recurrent.norm_behind_gate(
                _rows(out), _rows(x), _rows(gate), weight, eps, group_size, kind
            )
        )
        self.keep.append(weight)
        return out

    def sigmoid_gate(self, x: Symbol, gate: Symbol) -> Symbol:
        out, kind = self._new(x.rows, *x.tail), rows_kind(x.rows)
        self.instructions.append(recurrent.gate_by_sigmoid(_rows(out), _rows(x), _rows(gate), kind))
        return out


def _rows(x: Symbol) -> Rows:
    return Rows(x.address, x.stride, x.width)


def _require_tokens(*symbols: Symbol) -> None:
    if any(x.rows != TOKENS for x in symbols):
        raise NotRecordableError("states of other rows than the step's tokens")
