"""Random weights as quantised checkpoints keep them, and what each stands for.

A kind makes the tensors of a module from random codes and scales, and the weight from the same
numbers, by the definition of its format and without the readers' help. The layouts are those of
`golden`, which somebody else packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from streamserve.models.names import WeightNames
from streamserve.models.parameters import decoder_modules
from streamserve.models.pieces import module_pieces
from streamserve.models.spec import DecoderSpec

GROUP = 16
BLOCK = (16, 32)
STD = 0.15

Packed = tuple[dict[str, Tensor], Tensor]


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, C] -> [R, C·bits/32] int32: each row one stream of bits, lowest first."""
    stream = (codes.numpy()[..., None] >> numpy.arange(bits)) & 1
    flat = stream.reshape(len(codes), -1).astype(numpy.uint8)
    packed = numpy.packbits(flat, axis=1, bitorder="little")
    return torch.from_numpy(packed.view(numpy.int32).copy())


def _numbers(shape: tuple[int, ...], low: int, high: int, generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


def _scales(rows: int, groups: int, reach: float, generator: torch.Generator) -> Tensor:
    """Float16 numbers with which codes of ``reach`` steps have about the spread of `STD`."""
    return (STD / reach * (0.5 + torch.rand(rows, groups, generator=generator))).half().float()


def gptq(bits: int, *, act_order: bool = False, v2: bool = False, group: int = GROUP):
    def pack(rows: int, columns: int, generator: torch.Generator) -> Packed:
        size = columns if group == -1 else group
        codes = _numbers((rows, columns), 0, 2**bits, generator)
        zeros = _numbers((rows, columns // size), 1, 2**bits, generator)
        scales = _scales(rows, columns // size, 2**bits / 2, generator)
        g_idx = torch.arange(columns) // size
        if act_order:
            # Layers that share an input share its order: it is of the input alone.
            g_idx = g_idx[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
        stored_zeros = zeros if v2 else zeros - 1
        tensors = {
            "qweight": words(codes, bits).t().contiguous(),
            "qzeros": words(stored_zeros.t(), bits),
            "scales": scales.t().half().contiguous(),
            "g_idx": g_idx.int(),
        }
        return tensors, (codes - zeros[:, g_idx]) * scales[:, g_idx]

    return pack


def awq(rows: int, columns: int, generator: torch.Generator) -> Packed:
    codes = _numbers((rows, columns), 0, 16, generator)
    zeros = _numbers((rows, columns // GROUP), 0, 16, generator)
    scales = _scales(rows, columns // GROUP, 8, generator)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def gemm(numbers: Tensor) -> Tensor:
        return words(numbers.t().reshape(numbers.shape[1], -1, 8)[..., order].flatten(1), 4)

    tensors = {
        "qweight": gemm(codes),
        "qzeros": gemm(zeros),
        "scales": scales.t().half().contiguous(),
    }
    spread = zeros.repeat_interleave(GROUP, 1), scales.repeat_interleave(GROUP, 1)
    return tensors, (codes - spread[0]) * spread[1]


def squeezellm(bits: int):
    def pack(rows: int, columns: int, generator: torch.Generator) -> Packed:
        codes = _numbers((rows, columns), 0, 2**bits, generator)
        table = STD * torch.randn(rows, 2**bits, generator=generator)
        outliers = torch.zeros(rows, columns)
        chosen = torch.rand(rows, columns, generator=generator) < 0.02
        outliers[chosen] = 0.5
        outputs, inputs = chosen.nonzero(as_tuple=True)
        starts = torch.cat((torch.zeros(1), chosen.sum(1).cumsum(0)))
        full = torch.randn(columns, 1, generator=generator) * STD
        tensors = {
            "qweight": words(codes, bits).t().contiguous(),
            "lookup_table": table,
            "rows": starts.int(),
            "cols": inputs.int(),
            "vals": outliers[outputs, inputs],
            "full_rows": full,
            "full_row_indices": torch.tensor([rows - 1], dtype=torch.int32),
        }
        dense = table.gather(1, codes) + outliers
        dense[-1] += full[:, 0]
        return tensors, dense

    return pack


def compressed_int4(rows: int, columns: int, generator: torch.Generator) -> Packed:
    codes = _numbers((rows, columns), 0, 16, generator)
    zeros = _numbers((rows, columns // GROUP), 0, 16, generator)
    scales = _scales(rows, columns // GROUP, 8, generator).bfloat16().float()
    tensors = {
        "weight_packed": words(codes, 4),
        "weight_scale": scales.bfloat16(),
        "weight_zero_point": words(zeros.t(), 4).t().contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }
    spread = zeros.repeat_interleave(GROUP, 1), scales.repeat_interleave(GROUP, 1)
    return tensors, (codes - spread[0]) * spread[1]


def compressed_int8(rows: int, columns: int, generator: torch.Generator) -> Packed:
    values = _numbers((rows, columns), -127, 128, generator).to(torch.int8)
    scales = _scales(rows, 1, 128, generator)
    return {"weight": values, "weight_scale": scales}, values * scales


def float8(kind: str):
    def pack(rows: int, columns: int, generator: torch.Generator) -> Packed:
        values = (80 * torch.randn(rows, columns, generator=generator)).to(torch.float8_e4m3fn)
        if kind == "block":
            rows_of, columns_of = -(-rows // BLOCK[0]), -(-columns // BLOCK[1])
            scales = _scales(rows_of, columns_of, 80, generator)
            spread = scales.repeat_interleave(BLOCK[0], 0)[:rows]
            spread = spread.repeat_interleave(BLOCK[1], 1)[:, :columns]
            return {"weight": values, "weight_scale_inv": scales}, values.float() * spread
        scale = _scales(1, 1, 80, generator).view(())
        tensors = {"weight": values, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
        return tensors, values.float() * scale

    return pack


def nf4(rows: int, columns: int, generator: torch.Generator) -> Packed:
    """Blocks of 64 run over the ends of rows of 96."""
    codes = _numbers((rows, columns), 0, 16, generator)
    table = torch.linspace(-1, 1, 16)
    flat = codes.flatten().to(torch.uint8)
    blocks = rows * columns // 64
    offset = 0.25
    absmax = _numbers((blocks,), 0, 256, generator).to(torch.uint8)
    nested_map = torch.linspace(-1, 1, 256)
    nested = 0.1 * torch.rand(-(-blocks // 256), generator=generator)
    scales = nested_map[absmax.long()] * nested.repeat_interleave(256)[:blocks] + offset
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float16",
        "shape": [rows, columns],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    encoded = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors = {
        "weight": (flat[::2] << 4 | flat[1::2]).view(-1, 1),
        "weight.absmax": absmax,
        "weight.quant_map": table,
        "weight.nested_absmax": nested,
        "weight.nested_quant_map": nested_map,
        "weight.quant_state.bitsandbytes__nf4": encoded,
    }
    dense = (table[codes.flatten()].view(-1, 64) * scales[:, None]).view(rows, columns)
    return tensors, dense


def llm_int8(rows: int, columns: int, generator: torch.Generator) -> Packed:
    values = _numbers((rows, columns), -127, 128, generator).to(torch.int8)
    largest = 127 * _scales(rows, 1, 128, generator)
    tensors = {
        "weight": values,
        "SCB": largest[:, 0].contiguous(),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, values * largest / 127


@dataclass(frozen=True, slots=True)
class Kind:
    config: dict[str, Any]
    pack: Callable[[int, int, torch.Generator], Packed]
    head: bool = False


def mxfp4_experts(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Replaces gpt-oss's experts by random ones in MXFP4; their blocks and scales, by name."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32, 16)
        blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 127, shape[:-1], generator=generator, dtype=torch.uint8)
        made[name] = tensors[name + "_blocks"], tensors[name + "_scales"] = blocks, scales
    return made


def pack_modules(
    spec: DecoderSpec,
    names: WeightNames,
    kind: Kind,
    tensors: dict[str, Tensor],
    plain: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Replaces the linear modules of ``tensors`` by packed ones; returns what these stand for.

    All but the ``plain`` ones, and the head where the format leaves it.
    """
    dense = {}
    generator = torch.Generator().manual_seed(13)
    for module in decoder_modules(spec):
        is_kept = module.name in plain or (module.name == "head" and not kind.head)
        if module.role != "linear" or is_kept:
            continue
        for piece in module_pieces(names, module, "weight"):
            packed, weight = kind.pack(piece.rows, module.columns, generator)
            transposed = module.name in names.transposed
            dense[piece.name] = (weight.t() if transposed else weight).float().contiguous()
            del tensors[piece.name]
            tensors.update({f"{piece.base}.{key}": tensor for key, tensor in packed.items()})
    return dense


def edit_config(directory: Path, **changes: Any) -> None:
    """Changes fields of a checkpoint's config."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _compressed(kept_as: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": kept_as,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def _gptq(bits: int, **changes: Any) -> dict[str, Any]:
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False}
    return {**config, "sym": False, **changes}


KINDS: dict[str, Kind] = {
    "gptq-4-act-order": Kind(_gptq(4, desc_act=True, lm_head=True), gptq(4, act_order=True), True),
    "gptq-3": Kind(_gptq(3, group_size=-1), gptq(3, group=-1)),
    "gptq-2-v2": Kind(_gptq(2, checkpoint_format="gptq_v2"), gptq(2, v2=True)),
    "gptq-8": Kind(_gptq(8), gptq(8)),
    "awq": Kind({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
    "squeezellm-4": Kind({"quant_method": "squeezellm", "wbits": 4}, squeezellm(4)),
    "squeezellm-3": Kind({"quant_method": "squeezellm", "wbits": 3}, squeezellm(3)),
    "ct-int4": Kind(
        _compressed(
            "pack-quantized", num_bits=4, strategy="group", group_size=GROUP, symmetric=False
        ),
        compressed_int4,
    ),
    "ct-int8": Kind(_compressed("int-quantized", num_bits=8, strategy="channel"), compressed_int8),
    "fp8-block": Kind(
        {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"},
        float8("block"),
    ),
    "fp8-tensor": Kind({"quant_method": "fp8", "activation_scheme": "static"}, float8("tensor")),
    "bnb-nf4": Kind({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4),
    "bnb-int8": Kind({"quant_method": "bitsandbytes", "load_in_8bit": True}, llm_int8),
}
