"""compressed-tensors, as llm-compressor writes it (github.com/vllm-project/compressed-tensors).

Groups of modules, found by name or class, have each a scheme. How a weight is kept:

    pack-quantized    weight_packed [N, K·bits/32] int32, codes less their least value
    int-quantized     weight [N, K] int8
    float-quantized   weight [N, K] float8_e4m3fn          (naive-quantized: either)

with weight_scale (and weight_zero_point, packed down the column where the weight is packed) for
each output and group of inputs, each output, each block, or all. weight = (value - zero) · scale
(`_dequantize` in quantization/lifecycle). What a scheme says of activations is for products of
integers: here activations stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.quantised.gptq import act_order
from streamserve.models.quantised.options import Options
from streamserve.models.quantised.packing import unpack_words
from streamserve.models.quantised.reader import FLOATS, Part, Shape, Tensors, number_bytes
from streamserve_kernels.stored import Float8Weight, GroupedWeight, OneWeight, StoredFormat

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
_NAME = "compressed-tensors"
# Widths that divide a byte: of the others there are two ways to pack them.
_PACKED_BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Scheme:
    """``group_size`` counts inputs, ``block`` outputs and inputs, where the strategy has them."""

    targets: tuple[str, ...]
    is_float: bool
    bits: int
    strategy: str
    group_size: int
    block: tuple[int, int]
    symmetric: bool

    def matches(self, name: str) -> int:
        """How well: by name 3, by pattern 2, as a linear layer 1, not at all 0."""
        if name in self.targets:
            return 3
        patterns = [target[3:] for target in self.targets if target.startswith("re:")]
        if any(re.match(pattern, name) for pattern in patterns):
            return 2
        return 1 if "Linear" in self.targets else 0

    def scale_shapes(self, rows: int, columns: int) -> list[Shape]:
        if self.strategy == "tensor":
            return [(1,), (), (1, 1)]
        if self.strategy == "channel":
            return [(rows, 1), (rows,)]
        if self.strategy == "group":
            return [(rows, -(-columns // self.group_size))]
        return [(-(-rows // self.block[0]), -(-columns // self.block[1]))]

    def group(self, columns: int) -> int:
        return {"group": self.group_size, "block": self.block[1]}.get(self.strategy, columns)


@dataclass(frozen=True, slots=True)
class CompressedTensorsReader:
    schemes: tuple[Scheme, ...]
    # Of activations and of a cache in eight bits.
    unused: tuple[str, ...] = (
        r"\.(?:input|output|k|v|q)_(?:scale|zero_point)",
        r"\.(?:input|output)_global_scale",
    )

    @classmethod
    def from_config(cls, values: Mapping[str, Any], source: str) -> CompressedTensorsReader:
        options = Options(values, source, _NAME)
        sparsity = values.get("sparsity_config") or {}
        if sparsity.get("format", "dense") != "dense":
            raise options.unsupported("sparsity_config", sparsity["format"], "dense")
        if (values.get("transform_config") or {}).get("config_groups"):
            raise UnsupportedModelError(f"{source}: {_NAME}: transform_config is not supported")
        groups = values.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ModelLoadError(f"{source}: {_NAME}: config_groups is missing")
        return cls(
            tuple(_scheme(group, values, f"{source}: {name}") for name, group in groups.items())
        )

    def _scheme(self, tensors: Tensors, name: str) -> Scheme:
        best = max(self.schemes, key=lambda scheme: scheme.matches(name))
        if not best.matches(name):
            raise tensors.error(name, "is quantised, but no target of config_groups names it")
        return best

    def holds(self, tensors: Tensors, name: str) -> bool:
        weight = name + ".weight"
        return tensors.has_any(weight, "_packed", "_shape") or (
            tensors.dtype(weight) in (torch.int8, torch.float8_e4m3fn)
        )

    def parts(self, tensors: Tensors, name: str, rows: int, columns: int) -> Sequence[Part]:
        scheme = self._scheme(tensors, name)
        scales = scheme.scale_shapes(rows, columns)
        parts = [
            Part(".weight_scale", scales, FLOATS),
            Part(".weight_g_idx", [(columns,)], (torch.int32, torch.int64), optional=True),
        ]
        zeros = scales
        if tensors.has_any(name, ".weight_packed", ".weight_shape"):
            width = -(-columns * scheme.bits // 32)
            if tensors.dtype(name + ".weight_zero_point") == torch.int32:
                zeros = [(-(-rows * scheme.bits // 32), scales[0][-1])]
            parts += [
                Part(".weight_packed", [(rows, width)], [torch.int32]),
                Part(".weight_shape", [(2,)], (torch.int32, torch.int64)),
            ]
        else:
            dtype = torch.float8_e4m3fn if scheme.is_float else torch.int8
            parts.append(Part(".weight", [(rows, columns)], [dtype]))
        dtypes = (torch.int8, torch.int32, torch.float8_e4m3fn, *FLOATS)
        is_optional = scheme.symmetric or scheme.is_float
        parts.append(Part(".weight_zero_point", zeros, dtypes, optional=is_optional))
        return parts

    def format(self, tensors: Tensors, name: str, rows: int, columns: int) -> StoredFormat:
        scheme = self._scheme(tensors, name)
        scale_bytes = number_bytes(tensors, name + ".weight_scale")
        return StoredFormat(
            bits=scheme.bits,
            group=scheme.group(columns),
            group_bytes=scale_bytes + (0 if scheme.symmetric else 2),
            reordered=name + ".weight_g_idx" in tensors,
        )

    def read(self, tensors: Tensors, name: str, rows: int, columns: int) -> OneWeight:
        scheme = self._scheme(tensors, name)
        scales = tensors.read(name + ".weight_scale").float()
        if scheme.is_float:
            values = tensors.read(name + ".weight")
            if scheme.strategy in ("group", "block"):
                rows_of_block = scheme.block[0] if scheme.strategy == "block" else 1
                return Float8Weight(values, scales, (rows_of_block, scheme.group(columns)))
            return Float8Weight(values, scales.reshape(-1, 1))
        inputs = None
        if name + ".weight_g_idx" in tensors:
            inputs = act_order(tensors, name + ".weight_g_idx", scheme.group(columns))
        codes = self._codes(tensors, name, scheme, (rows, columns))
        return GroupedWeight(
            codes=codes if inputs is None else codes[:, inputs].contiguous(),
            bits=scheme.bits,
            scales=_of_rows(scales, scheme, rows),
            zeros=self._zeros(tensors, name, scheme, rows),
            group=scheme.group(columns),
            inputs=inputs,
        )

    def _codes(self, tensors: Tensors, name: str, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
        if name + ".weight_packed" not in tensors:
            return (tensors.read(name + ".weight").short() + 128).to(torch.uint8)
        stated = tensors.read(name + ".weight_shape").tolist()
        if stated != list(shape):
            raise tensors.error(
                name + ".weight_shape", f"is {stated}; the config asks for {list(shape)}"
            )
        return unpack_words(tensors.read(name + ".weight_packed"), scheme.bits, shape[1])

    def _zeros(self, tensors: Tensors, name: str, scheme: Scheme, rows: int) -> Tensor | float:
        middle = 2 ** (scheme.bits - 1)
        if scheme.symmetric:
            return float(middle)
        zeros: Tensor = tensors.read(name + ".weight_zero_point")
        if zeros.dtype == torch.int32:
            return unpack_words(zeros.t(), scheme.bits, rows).t().float().contiguous()
        return _of_rows(zeros.float() + middle, scheme, rows)


def _of_rows(numbers: Tensor, scheme: Scheme, rows: int) -> Tensor:
    """Scales or zeros of a weight, of an output or of a block -> [rows, G]."""
    if scheme.strategy == "block":
        return numbers.index_select(0, torch.arange(rows) // scheme.block[0])
    if scheme.strategy == "group":
        return numbers
    return numbers.reshape(-1, 1).expand(rows, 1).contiguous()


def _scheme(group: Any, config: Mapping[str, Any], source: str) -> Scheme:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise UnsupportedModelError(f"{source}: {_NAME}: a group must say its weights, got {group}")
    options = Options(group["weights"], source, f"{_NAME}: weights")
    kept_as = group.get("format") or config.get("format")
    if kept_as not in FORMATS:
        raise options.unsupported("format", kept_as, ", ".join(FORMATS))
    if group.get("output_activations"):
        raise UnsupportedModelError(f"{source}: {_NAME}: output_activations are not supported")
    kind = options.text_or("int", "type")
    strategy = options.text_or("", "strategy") or _implied_strategy(options)
    is_packed = kept_as == "pack-quantized"
    bits = options.one_of("num_bits", _PACKED_BITS if is_packed else (8,))
    if kind not in ("int", "float") or (kind == "float" and is_packed):
        raise options.unsupported("type", kind, "int" if is_packed else "int, float")
    if strategy not in STRATEGIES:
        raise options.unsupported("strategy", strategy, ", ".join(STRATEGIES))
    block = options.values.get("block_structure") or (1, 1)
    if isinstance(block, str):
        block = [int(part) for part in block.split("x")]
    return Scheme(
        targets=tuple(map(str, group.get("targets") or ())),
        is_float=kind == "float",
        bits=bits,
        strategy=strategy,
        group_size=options.group_size("group_size") if strategy == "group" else -1,
        block=(int(block[0]), int(block[1])),
        symmetric=options.values.get("symmetric", True) is not False,
    )


def _implied_strategy(options: Options) -> str:
    group_size = options.values.get("group_size")
    if group_size is None:
        return "tensor"
    return "channel" if group_size == -1 else "group"
