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
from streamserve_kernels.native.execute import done_flags, double_bits, eager, pack_step
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
# Weight bytes below which one thread is enough.
_PARALLEL_BYTES = 65536
# Most rows of which every thread sums the groups for itself, and what float8 is scaled by: see C.
_OWN_ROWS = 4
_FLOAT8_FACTOR = 256.0
_LINE = 64

_arena = Arena()


class GroupSums:
    """Memory for the sums of a step's groups of inputs: of all rows, and a few for each thread.

    Shared by instructions that run one after the other. Not for two threads at a time.
    """

    def __init__(self, rows: int, groups: int) -> None:
        self.own_stride = -(-_OWN_ROWS * groups * 4 // _LINE) * _LINE
        self.sums = torch.empty(rows * groups)
        self.own = torch.empty(pool().threads() * self.own_stride, dtype=torch.uint8)
        self.address = self.sums.data_ptr()


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


class LookupLinear:
    """What products with weights that are looked up have in common; x of any float dtype.

    Rows of x may be at any stride.
    """

    __slots__ = (
        "__weakref__",
        "_codes",
        "_descriptor",
        "bias",
        "dtype",
        "groups",
        "has_offsets",
        "in_features",
        "inputs",
        "inputs_address",
        "out_features",
        "quantization",
    )

    operation: str
    bias: Tensor | None
    dtype: torch.dtype
    groups: int
    has_offsets: bool  # whether sums of the groups' inputs are needed
    in_features: int
    inputs: Tensor | None  # [K] int64: the input of each column; None: their order is the layer's
    inputs_address: int  # where the same lies as int32, or 0
    out_features: int
    quantization: Quantization
    _codes: Tensor
    _descriptor: Tensor

    def arguments(
        self,
        y: int,
        x: int,
        x_stride: int,
        sums: GroupSums | None,
        done: Tensor | None,
        *,
        rows_kind: int = 0,
        is_float32: bool = False,
        best: int = 0,
        scale: float = 1.0,
        cap: float = 0.0,
        y_stride: int | None = None,
    ) -> tuple[int, ...]:
        """What `stored_sums` and `stored_linear` take: see stored_linear.c.

        Rows of y are `y_stride` elements apart, those of a weight of its own one after the other.
        x has its inputs in the weight's order. `sums` are given if there are offsets, and `done`
        are flags that no other instruction of the program has; without them no thread sums groups
        for itself.
        """
        return (
            y,
            x,
            x_stride,
            rows_kind,
            self._descriptor.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            int(is_float32),
            best,
            double_bits(scale),
            double_bits(cap),
            0 if sums is None else sums.address,
            0 if sums is None else sums.own.data_ptr(),
            0 if sums is None else sums.own_stride,
            0 if done is None else done.data_ptr(),
            self.out_features if y_stride is None else y_stride,
        )

    def __call__(self, x: Tensor) -> Tensor:
        if (symbol := as_symbol(x)) is not None:
            return cast(Tensor, symbol.recorder.linear(symbol, self))
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected rows of {self.in_features}, got {x.shape[-1]}")
        rows = x.reshape(-1, self.in_features).bfloat16()
        if self.inputs is not None:
            rows = rows.index_select(1, self.inputs)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        is_float32 = x.dtype != torch.bfloat16
        y = torch.empty(
            rows.shape[0], self.out_features, dtype=torch.float32 if is_float32 else x.dtype
        )
        # Kept until the run is over.
        sums = GroupSums(rows.shape[0], self.groups) if self.has_offsets else None
        done = done_flags() if self.has_offsets else None
        args = self.arguments(
            y.data_ptr(), rows.data_ptr(), rows.stride(0), sums, done, is_float32=is_float32
        )
        executable = eager(2 if self.has_offsets else 1)
        if self.has_offsets:
            executable.set(0, "stored_sums", *args)
        executable.set(int(self.has_offsets), self.operation, *args)
        threads = 1 if self._codes.nbytes < _PARALLEL_BYTES else pool().threads()
        executable.run(pack_step(rows.shape[0]), threads)
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
        self.groups = -(-self.in_features // group)
        self.inputs = plan.inputs
        self._inputs = None if plan.inputs is None else plan.inputs.to(torch.int32).contiguous()
        self._values = plan.values.float().repeat(256)[:256].contiguous()
        self._table = self._values[:64].bfloat16()
        self.inputs_address = 0 if self._inputs is None else self._inputs.data_ptr()
        self._scales, self._offsets = _Numbers(plan.scales), _Numbers(plan.offsets)
        self.has_offsets = self._offsets.form != _NO_NUMBERS
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
        executable = eager(1)
        executable.set(
            0, "stored_pack", codes.data_ptr(), codes.stride(0), self._descriptor.data_ptr()
        )
        executable.run(pack_step(0), pool().threads())

    @property
    def nbytes(self) -> int:
        parts = (self._codes, self.inputs, self._inputs, self.bias)
        return (
            sum(number_bytes(part) for part in parts) + self._scales.nbytes + self._offsets.nbytes
        )

    def _rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        ids = ids.contiguous()
        out = torch.empty(ids.shape[0], self.in_features, dtype=dtype)
        executable = eager(1)
        arguments = self.rows_arguments(out.data_ptr(), is_float32=dtype == torch.float32)
        executable.set(0, "stored_rows", *arguments)
        executable.run(pack_step(ids.shape[0], 0, 0, 0, ids.data_ptr()), pool().threads())
        return out

    def unpack(self) -> Tensor:
        """The weight [N, K] float32, inputs in the layer's order."""
        return self._rows(torch.arange(self.out_features), torch.float32)

    def rows(self, ids: Tensor) -> Tensor:
        if self.dtype != torch.bfloat16:
            return self._rows(ids, torch.float32).to(self.dtype)
        return self._rows(ids, torch.bfloat16)

    def rows_arguments(self, out: int, *, is_float32: bool = False) -> tuple[int, ...]:
        """What `stored_rows` takes: the address of its result, and how."""
        return (out, self._descriptor.data_ptr(), int(is_float32), self.inputs_address)


def prepare_lookup(
    weight: OneWeight, bias: Tensor | None, dtype: torch.dtype
) -> NativeStoredLinear | None:
    """The weight in lines; None: they do not take it."""
    plan = _plan(weight)
    return None if plan is None else NativeStoredLinear(plan, bias, dtype, stored_name(weight))
