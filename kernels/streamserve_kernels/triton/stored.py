"""Weights that a checkpoint holds quantised, on the GPU: `naive.prepare_stored` says what they are.

4 and 8 bits with whole zero points become the words of `packed`, whose kernels are the fastest; all
others keep the planes of `stored_naive`, which `stored_split` reads in words for up to 128 rows,
and `stored_kernels` byte by byte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton.language as tl
from torch import Tensor

from streamserve_kernels.interface import QuantLinear
from streamserve_kernels.stored import (
    PLANES,
    FactoredNumbers,
    Float8Weight,
    GroupedWeight,
    Numbers,
    OneWeight,
    StoredWeight,
)
from streamserve_kernels.stored_naive import (
    PackedStored,
    narrowed,
    pack_stored,
    prepare_parts,
    stored_name,
)
from streamserve_kernels.triton.linear import (
    FEW_ROWS,
    PACKED_ROWS,
    DequantisedLinear,
    PackedQuantLinear,
)
from streamserve_kernels.triton.packed import WORDS_PER_CHUNK, pack
from streamserve_kernels.triton.runtime import INTERPRETED
from streamserve_kernels.triton.stored_kernels import (
    KernelWeight,
    sparse_kernel,
    stored_product_kernel,
    stored_rows_kernel,
)
from streamserve_kernels.triton.stored_split import SplitWords, split_stored
from streamserve_kernels.triton.tuning import LIBRARY, Config, usable

_ROWS_BLOCK = 1024
_SPARSE_BLOCK = 128
_NO_OFFSETS, _ZERO, _ZEROS, _MINIMUMS = range(4)
_GEMV = (
    Config("gemm", 1, 4, 512, 4),
    Config("gemm", 1, 8, 256, 4),
    Config("gemm", 1, 16, 128, 4),
)
_FEW = (Config("gemm", 16, 32, 64, 4), Config("gemm", 16, 16, 128, 4))
_MANY = (Config("gemm", 32, 64, 32, 4), Config("gemm", 64, 64, 32, 4), LIBRARY)
# Float32 is not what these kernels are for: one that is right, and fits.
_FLOAT32 = (Config("gemm", 16, 32, 32, 4),)


@dataclass(frozen=True, slots=True)
class _Sparse:
    """Values beside a table, output by output."""

    starts: Tensor  # [N + 1] int32
    columns: Tensor  # int32
    values: Tensor  # float32


class PlanesWeight:
    """A `PackedStored` as the kernels take it; what `PackedQuantLinear` asks of a weight."""

    def __init__(self, packed: PackedStored) -> None:
        self._packed = packed
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.device = packed.planes[0].device
        self.sparse = None if packed.sparse is None else _sorted(packed.sparse, self.out_features)
        table = packed.table
        if packed.kind is Float8Weight:
            codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
            table = codes.float()[None].to(self.device)
        low, high = (*PLANES[packed.bits], 0)[:2]
        planes = tuple(plane.contiguous() for plane in packed.planes)
        numbers, zero, kind = _offsets(packed)
        scales, scale_units, scales_per = _fields(packed.scales)
        offsets, offset_units, offsets_per = _fields(numbers)
        group = min(packed.group or packed.in_features, packed.in_features)
        self.weight = KernelWeight(
            low=planes[0],
            high=planes[1] if high else None,
            table=None if table is None else table.contiguous(),
            scales=scales,
            scale_units=scale_units,
            offsets=offsets,
            offset_units=offset_units,
            zero=zero,
            group=group,
            G=-(-packed.in_features // group),
            LOW_BITS=tl.constexpr(low),
            HIGH_BITS=tl.constexpr(high),
            TABLE_ROW=tl.constexpr(0 if table is None or table.shape[0] == 1 else table.shape[1]),
            SCALES_PER=tl.constexpr(scales_per),
            OFFSETS=tl.constexpr(kind),
            OFFSETS_PER=tl.constexpr(offsets_per),
        )
        self.split = SplitWords.of(
            self.weight, packed.in_features, float8=packed.kind is Float8Weight
        )

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes

    def unpack(self, dtype: torch.dtype, rows: slice | Tensor | None = None) -> Tensor:
        """The weights of all rows, of a run of them or of those with ids [R] -> [R, K]."""
        if self.sparse is not None:
            return self._packed.dequantise(slice(None) if rows is None else rows).to(dtype)
        ids = rows.contiguous() if isinstance(rows, Tensor) else None
        first, count = 0, self.out_features
        if ids is not None:
            count = ids.shape[0]
        elif isinstance(rows, slice):
            first, end, _ = rows.indices(self.out_features)
            count = end - first
        out = torch.empty(count, self.in_features, dtype=dtype, device=self.device)
        if count == 0:
            return out
        stored_rows_kernel[(count, -(-self.in_features // _ROWS_BLOCK))](
            self.weight.low if ids is None else ids,
            out,
            first,
            self.out_features,
            self.in_features,
            self.weight,
            HAS_IDS=ids is not None,
            BLOCK_K=_ROWS_BLOCK,
        )
        return out


def _offsets(packed: PackedStored) -> tuple[Numbers | None, float, int]:
    """Zeros or minimums, the zero that all share, and which of these there is."""
    if packed.minimums is not None:
        return packed.minimums, 0.0, _MINIMUMS
    if isinstance(packed.zeros, Tensor):
        return packed.zeros, 0.0, _ZEROS
    return None, packed.zeros or 0.0, _ZERO if packed.zeros else _NO_OFFSETS


def _fields(numbers: Numbers | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Values, units and how many values share one: 0 where they have none, -1 without any."""
    if numbers is None:
        return None, None, -1
    if isinstance(numbers, FactoredNumbers):
        return numbers.codes.contiguous(), numbers.units.contiguous(), numbers.per
    return numbers.contiguous(), None, 0


def _sorted(sparse: tuple[Tensor, Tensor, Tensor], outputs: int) -> _Sparse:
    rows, columns, values = sparse
    order = rows.argsort(stable=True)
    counts = torch.bincount(rows, minlength=outputs)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return _Sparse(starts.int(), columns[order].int(), values[order].float())


class PlanesLinear(DequantisedLinear[PlanesWeight]):
    """Weights of any stored kind."""

    __slots__ = ()

    def __init__(self, weight: OneWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        name, inputs = stored_name(weight), None
        if isinstance(weight, GroupedWeight):
            # Held as if columns were inputs: x is put in order instead.
            inputs, weight = weight.inputs, replace(weight, inputs=None)
        super().__init__(PlanesWeight(pack_stored(weight)), bias, dtype, name, inputs)

    def tuning_key(self, rows: int) -> str:
        weight = self.packed.weight
        sizes = [size.value for size in weight if isinstance(size, tl.constexpr)]
        options = ",".join(map(str, [*sizes, weight.table is None, weight.group]))
        bias = "" if self.bias is None else f",{self.bias.dtype} bias"
        shape = f"{self.out_features}x{self.in_features}"
        return f"planes,{options},{shape},{self.dtype}{bias},{rows}"

    def candidates(self, rows: int) -> tuple[Config, ...]:
        if rows > PACKED_ROWS:
            return (LIBRARY,)
        if self.dtype == torch.float32:
            return _GEMV if rows == 1 else _FLOAT32
        words = self.packed.split
        split = () if words is None else usable(words.candidates(rows), self.device)
        if rows <= FEW_ROWS:
            # Codes read byte by byte take several times as long: all rows of a tile are worth it.
            return (*split, *(_GEMV if rows == 1 else _FEW))
        return (*_MANY, *split)

    def _launch(self, rows: Tensor, config: Config, y: Tensor) -> None:
        packed, count = self.packed, rows.shape[0]
        if config.kernel == "split":
            assert packed.split is not None
            split_stored(rows, packed.split, self.bias, y.view(count, -1), self.counters, config)
        else:
            self._launch_tiles(rows, config, y)
        if packed.sparse is not None:
            sparse = packed.sparse
            sparse_kernel[(self.out_features, count)](
                rows,
                sparse.starts,
                sparse.columns,
                sparse.values,
                y,
                self.out_features,
                self.in_features,
                BLOCK=_SPARSE_BLOCK,
            )

    def _launch_tiles(self, rows: Tensor, config: Config, y: Tensor) -> None:
        packed, count = self.packed, rows.shape[0]
        grid = -(-self.out_features // config.block_n), -(-count // config.block_m)
        stored_product_kernel[grid](
            rows,
            packed.weight.low if self.bias is None else self.bias,
            y,
            count,
            self.out_features,
            self.in_features,
            packed.weight,
            HAS_BIAS=self.bias is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            INTERPRETED=INTERPRETED,
            num_warps=config.num_warps,
        )


def _words(weight: GroupedWeight, bias: Tensor | None, dtype: torch.dtype) -> QuantLinear | None:
    """The weight in the words of `packed`; None: it does not fit them."""
    bits, width = weight.bits, weight.shape[1]
    if bits not in (4, 8) or weight.zeros is None or isinstance(weight.scales, FactoredNumbers):
        return None
    chunks, rest = divmod(weight.group, WORDS_PER_CHUNK * 32 // bits)
    is_row = weight.group >= width
    if not is_row and (rest or chunks & (chunks - 1)):
        return None
    zeros = weight.zeros
    if not isinstance(zeros, Tensor):
        zeros = torch.full_like(weight.scales, zeros)
    if not zeros.equal(zeros.round()) or zeros.min() < 0 or zeros.max() > 2**bits:
        return None
    has_zeros = not bool((zeros == 2 ** (bits - 1)).all())
    scales = narrowed(weight.scales)
    assert isinstance(scales, Tensor)
    packed = pack(
        weight.codes,
        scales,
        zeros.to(torch.int16) if has_zeros else None,
        bits=bits,
        group_size=None if is_row else weight.group,
        in_features=width,
    )
    return PackedQuantLinear(packed, bias, dtype, stored_name(weight), weight.inputs)


def _prepare(weight: OneWeight, bias: Tensor | None, dtype: torch.dtype) -> QuantLinear:
    if isinstance(weight, GroupedWeight):
        words = _words(weight, bias, dtype)
        if words is not None:
            return words
    return PlanesLinear(weight, bias, dtype)


def prepare_stored(weight: StoredWeight, bias: Tensor | None, dtype: torch.dtype) -> QuantLinear:
    """See `naive.prepare_stored`. Activations are not quantised."""
    return prepare_parts(weight, bias, lambda part, part_bias: _prepare(part, part_bias, dtype))
