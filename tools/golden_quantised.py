"""Writes tests/models/golden.safetensors: small weights, each packed by the library of its format.

    python tools/golden_quantised.py --autogptq DIR --autoawq DIR --squeezellm DIR

It runs in an environment with torch, transformers, bitsandbytes and compressed-tensors. The other
three packers need no CUDA for packing, but their packages do not import without it: DIR is where
each was unpacked (the wheel of auto-gptq 0.7.1, the sources of autoawq 0.2.9, a checkout of
https://github.com/SqueezeAILab/SqueezeLLM), and the one module that packs is loaded by its path.

Beside the packed tensors stands `expected`, the weight as the library dequantises it; beside each
case its `quantization_config` and its source.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TARGET = Path(__file__).parents[1] / "tests" / "models" / "golden.safetensors"
ROWS, COLUMNS, GROUP = 32, 96, 32

Case = tuple[dict[str, Any], dict[str, Tensor], Tensor]


def load(name: str, path: Path, **stand_ins: dict[str, Any]) -> ModuleType:
    """The module at ``path``, with modules that it imports replaced by names with values."""
    for stand_in, values in stand_ins.items():
        full = stand_in.replace("__", ".")
        module = ModuleType(full)
        module.__dict__.update(values)
        sys.modules[full] = module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def linear(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = torch.randn(rows, columns, generator=generator).half().float()
    return layer


def grouped_scales(
    weight: Tensor, bits: int, group: int, symmetric: bool, inputs: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a quantiser finds: the nearest codes' weight, scales and zeros [N, G]."""
    rows, columns = weight.shape
    ordered = weight if inputs is None else weight[:, inputs]
    groups = ordered.view(rows, columns // group, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    top = 2**bits - 1
    if symmetric:
        reach = torch.maximum(low.abs(), high)
        scales = (2 * reach / top).half().float()
        zeros = torch.full_like(scales, (top + 1) // 2)
    else:
        scales = ((high - low) / top).half().float()
        # Never 0: AutoGPTQ takes one off, and a zero would spill into its neighbours.
        zeros = (-low / scales).round().clamp(1, top)
    return ordered, scales, zeros


def gptq(module: ModuleType) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for bits in (2, 3, 4, 8):
        for act_order in (False, True):
            for symmetric in (True, False):
                layer = linear(bits)
                weight = layer.weight.data
                order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(bits))
                inputs = order if act_order else None
                _, scales, zeros = grouped_scales(weight, bits, GROUP, symmetric, inputs)
                g_idx = torch.arange(COLUMNS, dtype=torch.int32) // GROUP
                if inputs is not None:
                    g_idx = torch.empty_like(g_idx).scatter_(0, inputs, g_idx)
                top = 2**bits - 1
                near = (weight / scales[:, g_idx.long()] + zeros[:, g_idx.long()]).round()
                codes = near.clamp(0, top)
                layer.weight.data = (codes - zeros[:, g_idx.long()]) * scales[:, g_idx.long()]
                packed = module.QuantLinear(bits, GROUP, COLUMNS, ROWS, bias=False)
                layer = layer.float()
                packed.pack(layer, scales.clone(), zeros.clone(), g_idx)
                packed.scales = packed.scales.half()
                dense = packed(torch.eye(COLUMNS).half()).t().contiguous()
                name = f"gptq-{bits}{'-act' if act_order else ''}{'-sym' if symmetric else ''}"
                config = {
                    "quant_method": "gptq",
                    "bits": bits,
                    "group_size": GROUP,
                    "desc_act": act_order,
                    "sym": symmetric,
                    "checkpoint_format": "gptq",
                }
                names = ("qweight", "qzeros", "scales", "g_idx")
                cases[name] = config, {n: getattr(packed, n) for n in names}, dense
    return cases


def awq(gemm: ModuleType, gemv: ModuleType, packing: ModuleType) -> dict[str, Case]:
    layer = linear(11)
    _, scales, zeros = grouped_scales(layer.weight.data, 4, GROUP, symmetric=False)
    spread = scales.repeat_interleave(GROUP, 1), zeros.repeat_interleave(GROUP, 1)
    codes = (layer.weight.data / spread[0] + spread[1]).round().clamp(0, 15)
    layer.weight.data = (codes - spread[1]) * spread[0]
    names = ("qweight", "qzeros", "scales")
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
    wide = gemm.WQLinear_GEMM.from_linear(
        layer, 4, GROUP, scales=scales.t().contiguous(), zeros=zeros.t().contiguous()
    )
    dense = packing.dequantize_gemm(wide.qweight, wide.qzeros, wide.scales, 4, GROUP)
    dense = dense.t().contiguous()
    tall = gemv.WQLinear_GEMV.from_linear(layer, 4, GROUP, scales=scales, zeros=zeros)
    return {
        "awq-gemm": ({**config, "version": "gemm"}, {n: getattr(wide, n) for n in names}, dense),
        # The same numbers in the other layout.
        "awq-gemv": ({**config, "version": "gemv"}, {n: getattr(tall, n) for n in names}, dense),
    }


def squeezellm(module: ModuleType) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for bits in (3, 4):
        for include_sparse in (False, True):
            generator = torch.Generator().manual_seed(20 + bits)
            layer = linear(20 + bits)
            table = torch.randn(ROWS, 2**bits, generator=generator).sort().values
            codes = torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=generator)
            dense = table.gather(1, codes)
            outliers = torch.zeros(ROWS, COLUMNS)
            if include_sparse:
                chosen = torch.rand(ROWS, COLUMNS, generator=generator) < 0.03
                outliers[chosen] = 5.0 + torch.rand(int(chosen.sum()), generator=generator)
            lut = [
                [(t.numpy(), c.numpy().astype(numpy.int32))]
                for t, c in zip(table, codes, strict=True)
            ]
            packed = module.QuantLinearLUT(bits, COLUMNS, ROWS, False, include_sparse)
            pack = getattr(packed, "pack2", None) or packed.pack
            sparse = outliers.clone().to_sparse() if include_sparse else None
            pack(layer, (lut, sparse), include_sparse)
            tensors = {"qweight": packed.qweight, "lookup_table": packed.lookup_table}
            if include_sparse:
                tensors |= {name: getattr(packed, name) for name in ("rows", "cols", "vals")}
                # An outlier is added to what the table has nearest to zero.
                nearest = table.gather(1, table.abs().argmin(1, keepdim=True))
                dense = dense + torch.where(outliers != 0, outliers - nearest, 0.0)
            name = f"squeezellm-{bits}{'-sparse' if include_sparse else ''}"
            cases[name] = {"quant_method": "squeezellm", "wbits": bits}, tensors, dense
    return cases


def bitsandbytes() -> dict[str, Case]:
    from bitsandbytes import functional

    cases: dict[str, Case] = {}
    for kind, nested, rows, columns in (
        # With 96 columns blocks of 64 run from one row into the next.
        ("nf4", False, 32, 96),
        # 288 scales: two blocks of scales themselves.
        ("nf4", True, 192, 96),
        ("nf4", True, 32, 128),
        ("fp4", False, 32, 128),
    ):
        weight = linear(31, rows, columns).weight.data.half()
        data, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type=kind, compress_statistics=nested
        )
        tensors = {"weight": data}
        tensors |= {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        # Its kernel for CPUs has every row begin a block, which its quantiser and others do not.
        state.shape = torch.Size((weight.numel() // 64, 64))
        dense = functional.dequantize_4bit(data, state).view(weight.shape)
        name = f"bnb-{kind}{'-nested' if nested else ''}-{columns}"
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        cases[name] = config, tensors, dense
    weight = linear(32).weight.data.half()
    codes, scales, _ = functional.int8_vectorwise_quant(weight)
    dense = functional.int8_vectorwise_dequant(codes, scales)
    tensors = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    cases["bnb-int8"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors, dense
    return cases


def compressed_tensors() -> dict[str, Case]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    cases: dict[str, Case] = {}
    dtype = torch.bfloat16
    for name, kept_as, bits, kind, strategy, symmetric in (
        ("pack-4-group", "pack-quantized", 4, "int", "group", True),
        ("pack-4-group-asym", "pack-quantized", 4, "int", "group", False),
        ("pack-8-channel", "pack-quantized", 8, "int", "channel", True),
        ("int8-channel", "int-quantized", 8, "int", "channel", True),
        ("int8-tensor-asym", "int-quantized", 8, "int", "tensor", False),
        ("fp8-tensor", "float-quantized", 8, "float", "tensor", True),
        ("fp8-channel", "float-quantized", 8, "float", "channel", True),
        ("fp8-block", "float-quantized", 8, "float", "block", True),
        ("naive-int8", "naive-quantized", 8, "int", "channel", True),
    ):
        weight = linear(40 + len(cases)).weight.data
        args = QuantizationArgs(
            num_bits=bits,
            type=kind,
            strategy=strategy,
            symmetric=symmetric,
            group_size=GROUP if strategy == "group" else None,
            block_structure=[16, 32] if strategy == "block" else None,
        )
        top = 2 ** (bits - 1) - 1 if kind == "int" else 448
        blocks = {
            "tensor": weight.view(1, -1),
            "channel": weight,
            "group": weight.view(ROWS, -1, GROUP),
            "block": weight.view(ROWS // 16, 16, COLUMNS // 32, 32).transpose(1, 2).flatten(2),
        }[strategy]
        low, high = blocks.amin(-1), blocks.amax(-1)
        if symmetric:
            scales = (torch.maximum(low.abs(), high) / top).to(dtype)
            zeros = None
        else:
            scales = ((high - low) / (2**bits - 1)).to(dtype)
            zeros = (-top - 1 - low / scales.float()).round().clamp(-top - 1, top).to(torch.int8)
        if strategy == "channel":
            scales = scales.view(-1, 1)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=kept_as)
        state = {"weight": weight.to(dtype), "weight_scale": scales}
        if zeros is not None:
            state["weight_zero_point"] = zeros
        compressor = BaseCompressor.get_value_from_registry(kept_as)
        packed = compressor.compress(state, scheme)
        dense = compressor.decompress(dict(packed), scheme)["weight"]
        config = {
            "quant_method": "compressed-tensors",
            "format": kept_as,
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
            },
            "ignore": ["lm_head"],
        }
        cases[f"ct-{name}"] = config, packed, dense
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("autogptq", "autoawq", "squeezellm"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    linears = args.autoawq / "awq" / "modules" / "linear"
    packing = load("awq_packing", args.autoawq / "awq" / "utils" / "packing_utils.py")
    stand_ins = {
        "awq": {},
        "awq__utils": {},
        "awq__utils__module": {"try_import": lambda _: (None, "")},
        "awq__utils__utils": {"get_best_device": lambda: "cpu"},
        "awq__utils__packing_utils": vars(packing),
    }
    gptq_path = args.autogptq / "auto_gptq" / "nn_modules" / "qlinear" / "qlinear_cuda.py"
    lut = load("squeezellm_quant", args.squeezellm / "squeezellm" / "quant.py", quant_cuda={})
    found = {
        "auto-gptq 0.7.1, QuantLinear.pack and forward": gptq(load("gptq", gptq_path)),
        "autoawq 0.2.9, WQLinear_GEMM and WQLinear_GEMV.from_linear, dequantize_gemm": awq(
            load("gemm", linears / "gemm.py", **stand_ins),
            load("gemv", linears / "gemv.py", **stand_ins),
            packing,
        ),
        "SqueezeLLM a5fd71f, QuantLinearLUT.pack2": squeezellm(lut),
        f"bitsandbytes {version('bitsandbytes')}": bitsandbytes(),
        f"compressed-tensors {version('compressed-tensors')}": compressed_tensors(),
    }
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for source, cases in found.items():
        for name, (config, packed, dense) in cases.items():
            metadata[name] = json.dumps({"source": source, "quantization_config": config})
            named = {**packed, "expected": dense}
            tensors |= {
                f"{name}/{key}": t.detach().clone().contiguous() for key, t in named.items()
            }
    save_file(tensors, TARGET, metadata)
    print(f"{TARGET}: {len(metadata)} cases, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
