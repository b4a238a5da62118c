"""Products with weights that a checkpoint holds quantised: lines of codes for `stored_linear.c`.

`src/stored.h` describes the layout. Activations are rounded to bfloat16, which they mostly are, and
so is what a code stands for, before its scale: integers, MXFP4 and float8 are exact, NF4's and
SqueezeLLM's tables are not. Sums run in float32, so that an output differs from the naive twin's by
at most

    2**-8 of the sum of |x|·|w|

and a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from streamserve_kernels.huge_pages import Arena
from streamserve_kernels.native.execute import Instruction, pack_step, run_at_once
from streamserve_kernels.native.product import Memory, NativeWeight, Product, as_rows, multiply
from streamserve_kernels.native.symbol import as_symbol
from streamserve_kernels.pool import pool
from streamserve_kernels.quantised import Quantization
from streamserve_kernels.stored import (
    STORED_OUTPUTS,
    FactoredNumbers,
    Float8Weight,
    GroupedWeight,
    Numbers,
    OneWeight,
    TableWeight,
    expand,
)
from streamserve_kernels.stored_naive import (
    narrowed,
    narrowed_tensor,
    number_bytes,
    stored_name,
)

BLOCK = STORED_OUTPUTS
# In the order of stored.h: kinds by bits, inputs of a step and bytes of its codes for an output.
KINDS = {2: 0, 3: 1, 4: 2, 5: 3, 6: 4, 8: 5}
FLOAT8_KIND = 6
STEPS = (16, 32, 8, 32, 16, 4, 4)
STEP_BYTES = (4, 12, 4, 20, 12, 4, 4)
_NO_NUMBERS, _HALF, _FLOAT, _FACTORED_HALF, _FACTORED_FLOAT = range(5)
_SUM_BYTES = 4
_FLOAT8_FACTOR = 256.0  # what float8 is scaled by: see C

_arena = Arena()


@dataclass(frozen=True, slots=True)
class _Plan:
    """A stored weight as the C side takes it: codes [N, K] uint8 and what they stand for."""

    kind: int
    codes: Tensor
    values: Tensor  # [codes there are] float32
    group: int
    scales: Numbers | None
    offsets: Numbers | None = None
    offsets_are_zeros: bool = False
    inputs: Tensor | None = None


def _is_bfloat16(values: Tensor) -> bool:
    return values.bfloat16().float().equal(values)


def _plan_grouped(weight: GroupedWeight) -> _Plan:
    kind, codes = KINDS[weight.bits], torch.arange(2.0**weight.bits)
    # Eight bits are held signed.
    center = 128.0 if weight.bits == 8 else 0.0
    offsets: Numbers | None = weight.minimums
    if weight.minimums is not None:
        if center:
            return _Plan(-1, weight.codes, codes, weight.group, weight.scales)
    elif isinstance(weight.zeros, Tensor):
        zeros = weight.zeros.float()
        if zeros.equal(zeros.round()):
            center = 2.0 ** (weight.bits - 1)
        offsets = zeros - center
    elif weight.zeros is not None and (weight.bits < 8 or weight.zeros == center):
        center = weight.zeros
    elif weight.zeros is not None:
        offsets = torch.full_like(expand(weight.scales), weight.zeros - center)
    return _Plan(
        kind,
        weight.codes,
        codes - center,
        weight.group,
        weight.scales,
        offsets,
        weight.minimums is None,
        weight.inputs,
    )


def _plan(weight: OneWeight) -> _Plan | None:
    """How the C side would take it; None: it does not."""
    if isinstance(weight, Float8Weight):
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        codes = weight.values.contiguous().view(torch.uint8)
        if ((codes & 127) == 127).any():
            return None  # no number
        plan = _Plan(
            FLOAT8_KIND,
            codes,
            values / _FLOAT8_FACTOR,
            weight.group,
            (weight.row_scales() * _FLOAT8_FACTOR).contiguous(),
        )
    elif isinstance(weight, TableWeight):
        if weight.table.shape[0] > 1 or weight.sparse is not None or weight.bits > 4:
            return None
        group = weight.group if weight.scales is not None else weight.shape[1]
        plan = _Plan(KINDS[weight.bits], weight.codes, weight.table[0], group, weight.scales)
    else:
        plan = _plan_grouped(weight)
        if plan.kind < 0 or not _is_bfloat16(plan.values):
            return None
    step, width = STEPS[plan.kind], weight.shape[1]
    whole = width % step == 0 and (plan.group >= width or plan.group % step == 0)
    return plan if whole and min(weight.shape) > 0 else None


def _blocks(numbers: Tensor) -> Tensor:
    """[N, G] -> [N / 64][G][64], what is not there 0."""
    padded = pad(numbers, (0, 0, 0, -numbers.shape[0] % BLOCK))
    return padded.view(-1, BLOCK, numbers.shape[1]).transpose(1, 2).contiguous()


class _Numbers:
    """Scales, zeros or minimums in blocks, and the four fields that tell C of them."""

    def __init__(self, numbers: Numbers | None) -> None:
        self.form, self.shift = _NO_NUMBERS, 0
        self.values: Tensor | None = None
        self.units: Tensor | None = None
        if numbers is None:
            return
        if isinstance(numbers, FactoredNumbers):
            per = numbers.per
            if per & (per - 1):
                numbers = numbers.expand()
            else:
                units = narrowed_tensor(numbers.units)
                is_half = units.dtype == torch.float16
                self.form = _FACTORED_HALF if is_half else _FACTORED_FLOAT
                self.shift = per.bit_length() - 1
                self.values, self.units = _blocks(numbers.codes), _blocks(units)
                return
        values = narrowed(numbers)
        assert isinstance(values, Tensor)
        self.form = _HALF if values.dtype == torch.float16 else _FLOAT
        self.values = _blocks(values)

    @property
    def nbytes(self) -> int:
        return number_bytes(self.values) + number_bytes(self.units)

    def fields(self) -> tuple[int, ...]:
        addresses = (0 if t is None else t.data_ptr() for t in (self.values, self.units))
        return (self.form, *addresses, self.shift)


class LookupLinear(NativeWeight):
    """What products with weights that are looked up have in common; x of any float dtype.

    Rows of x may be at any stride.
    """

    __slots__ = (
        "__weakref__",
        "_codes",
        "_descriptor",
        "bias",
        "dtype",
        "group",
        "in_features",
        "inputs_address",
        "out_features",
        "quantization",
    )

    operation: str
    bias: Tensor | None
    dtype: torch.dtype
    group: int  # inputs whose sum the product needs, or 0
    in_features: int
    inputs_address: int  # of [K] int32: the input of each column; 0: their order is the layer's
    out_features: int
    quantization: Quantization
    _codes: Tensor
    _descriptor: Tensor

    def instructions(self, product: Product, memory: Memory) -> list[Instruction]:
        """Inputs come into the weight's order and groups are summed, where it needs that."""
        found: list[Instruction] = []
        if self.inputs_address:
            y, width = memory.rows(self.in_features), self.in_features
            ordered = product._replace(y=y, y_stride=width)
            found.append(("gather_inputs", (*ordered, self.inputs_address)))
            product = product._replace(x=y, x_stride=width)
        if self.group:
            product = product.with_work(memory, -(-self.in_features // self.group) * _SUM_BYTES)
            found.append(("stored_sums", (*product, self.group)))
        bias = 0 if self.bias is None else self.bias.data_ptr()
        found.append((self.operation, (*product, self._descriptor.data_ptr(), bias)))
        return found

    def __call__(self, x: Tensor) -> Tensor:
        if (symbol := as_symbol(x)) is not None:
            return cast(Tensor, symbol.recorder.linear(symbol, self))
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected rows of {self.in_features}, got {x.shape[-1]}")
        rows = as_rows(x.bfloat16())
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        y = torch.empty(rows.shape[0], self.out_features, dtype=dtype)
        multiply(self, self._codes.nbytes, rows, y)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


class NativeStoredLinear(LookupLinear):
    """A stored weight in lines."""

    operation = "stored_linear"

    __slots__ = ("_inputs", "_offsets", "_scales", "_table", "_values")

    def __init__(
        self, plan: _Plan, bias: Tensor | None, dtype: torch.dtype, quantization: Quantization
    ) -> None:
        self.out_features, self.in_features = plan.codes.shape
        self.dtype = dtype
        self.quantization: Quantization = quantization
        self.bias = None if bias is None else bias.float().contiguous()
        group = min(plan.group, self.in_features)
        self._inputs = None if plan.inputs is None else plan.inputs.to(torch.int32).contiguous()
        self._values = plan.values.float().repeat(256)[:256].contiguous()
        self._table = self._values[:64].bfloat16()
        self.inputs_address = 0 if self._inputs is None else self._inputs.data_ptr()
        self._scales, self._offsets = _Numbers(plan.scales), _Numbers(plan.offsets)
        self.group = 0 if plan.offsets is None else group
        step_bytes = STEP_BYTES[plan.kind] * BLOCK
        blocks, steps = -(-self.out_features // BLOCK), self.in_features // STEPS[plan.kind]
        self._codes = _arena.empty((blocks, steps, step_bytes), torch.uint8).zero_()
        self._descriptor = torch.tensor(
            (
                plan.kind,
                self.out_features,
                self.in_features,
                group,
                self._codes.data_ptr(),
                self._table.data_ptr(),
                self._values.data_ptr(),
                *self._scales.fields(),
                *self._offsets.fields(),
                int(plan.offsets_are_zeros),
            ),
            dtype=torch.int64,
        )
        codes = plan.codes if plan.codes.stride(1) == 1 else plan.codes.contiguous()
        args = (codes.data_ptr(), codes.stride(0), self._descriptor.data_ptr())
        run_at_once([("stored_pack", args)], pack_step(0), pool().threads())

    @property
    def nbytes(self) -> int:
        parts = (self._codes, self._inputs, self.bias)
        return (
            sum(number_bytes(part) for part in parts) + self._scales.nbytes + self._offsets.nbytes
        )

    def _rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        ids = ids.contiguous()
        out = torch.empty(ids.shape[0], self.in_features, dtype=dtype)
        rows = self.embedding(out.data_ptr(), is_float32=dtype == torch.float32)
        step = pack_step(ids.shape[0], 0, 0, 0, ids.data_ptr())
        run_at_once([rows], step, pool().threads())
        return out

    def unpack(self) -> Tensor:
        """The weight [N, K] float32, inputs in the layer's order."""
        return self._rows(torch.arange(self.out_features), torch.float32)

    def rows(self, ids: Tensor) -> Tensor:
        if self.dtype != torch.bfloat16:
            return self._rows(ids, torch.float32).to(self.dtype)
        return self._rows(ids, torch.bfloat16)

    def embedding(self, out: int, *, is_float32: bool = False) -> Instruction:
        address = self._descriptor.data_ptr()
        return "stored_rows", (out, address, int(is_float32), self.inputs_address)


def prepare_lookup(
    weight: OneWeight, bias: Tensor | None, dtype: torch.dtype
) -> NativeStoredLinear | None:
    """The weight in lines; None: they do not take it."""
    plan = _plan(weight)
    return None if plan is None else NativeStoredLinear(plan, bias, dtype, stored_name(weight))
