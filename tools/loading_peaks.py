"""How much memory loading takes at its worst, for each way in which a checkpoint may be stored.

    python -m tools.loading_peaks --work /tmp/peaks                      # all of them
    python -m tools.loading_peaks --work /tmp/peaks awq gguf-q4_k

Each checkpoint (random weights of one shape, written once into the directory) is loaded in a
process of its own, by the kernels that serve on this machine. A thread reads the process's
anonymous memory (RssAnon of /proc/self/status) every millisecond; what it had before the load is
taken off. File pages are counted apart: they are the page cache's, and can be taken back at any
time. The largest VmHWM, both together, is printed besides. Needs the `gguf` package for GGUF files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
MB = 1e6
HIDDEN, INNER, LAYERS, VOCAB, KV_SIZE, GROUP = 1024, 4096, 12, 32000, 512, 128
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV_SIZE, HIDDEN),
    "self_attn.v_proj": (KV_SIZE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
EXPERTS = 32
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "mxfp4"},
}


def words(rows: int, columns: int) -> Tensor:
    """Any word is eight codes of 4 bits."""
    return torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int64).to(torch.int32)


def numbers(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (0.01 * (0.5 + torch.rand(shape))).to(dtype)


def plain(rows: int, columns: int) -> Tensors:
    weight = torch.empty(rows, columns, dtype=torch.bfloat16)
    return {"weight": weight.normal_(0.0, 0.02)}


def gptq(rows: int, columns: int, *, act_order: bool = False) -> Tensors:
    groups = torch.arange(columns) // GROUP
    if act_order:  # of the input alone: layers that share one share its order
        groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    return {
        "qweight": words(columns // 8, rows),
        "qzeros": words(columns // GROUP, rows // 8),
        "scales": numbers(columns // GROUP, rows),
        "g_idx": groups.int(),
    }


def awq(rows: int, columns: int) -> Tensors:
    return {
        "qweight": words(columns, rows // 8),
        "qzeros": words(columns // GROUP, rows // 8),
        "scales": numbers(columns // GROUP, rows),
    }


def squeezellm(rows: int, columns: int) -> Tensors:
    """A two-hundredth of the weights beside the table, as upstream has them."""
    per_row = columns // 200
    return {
        "qweight": words(columns // 8, rows),
        "lookup_table": 0.02 * torch.randn(rows, 16, dtype=torch.float16),
        "rows": torch.arange(0, per_row * rows + 1, per_row, dtype=torch.int32),
        "cols": torch.randint(0, columns, (per_row * rows,), dtype=torch.int32),
        "vals": torch.randn(per_row * rows, dtype=torch.float16),
    }


def compressed(rows: int, columns: int) -> Tensors:
    return {
        "weight_packed": words(rows, columns // 8),
        "weight_scale": numbers(rows, columns // GROUP, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns]),
    }


def fp8(rows: int, columns: int) -> Tensors:
    blocks = (-(-rows // GROUP), columns // GROUP)
    return {
        "weight": torch.randn(rows, columns).to(torch.float8_e4m3fn),
        "weight_scale_inv": numbers(*blocks, dtype=torch.float32),
    }


def nf4(rows: int, columns: int) -> Tensors:
    state = {"blocksize": 64, "shape": [rows, columns], "quant_type": "nf4", "dtype": "bfloat16"}
    encoded = numpy.frombuffer(json.dumps(state).encode(), dtype=numpy.uint8).copy()
    return {
        "weight": torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8),
        "weight.absmax": numbers(rows * columns // 64, dtype=torch.float32),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.quant_state.bitsandbytes__nf4": torch.from_numpy(encoded),
    }


def llm_int8(rows: int, columns: int) -> Tensors:
    return {
        "weight": torch.randint(-127, 128, (rows, columns), dtype=torch.int8),
        "SCB": numbers(rows, dtype=torch.float32),
    }


Make = Callable[[int, int], Tensors]


def llama(make: Make, k_proj: Make | None = None) -> Tensors:
    """The tensors of a model, its layers' matrices made by ``make``."""
    tensors: Tensors = {}

    def add(name: str, made: Tensors) -> None:
        tensors.update({f"{name}.{leaf}": tensor for leaf, tensor in made.items()})

    add("model.embed_tokens", plain(VOCAB, HIDDEN))
    for layer in range(LAYERS):
        for name, shape in MATRICES.items():
            is_k = k_proj is not None and "k_proj" in name
            add(f"model.layers.{layer}.{name}", (k_proj if is_k and k_proj else make)(*shape))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
            add(f"model.layers.{layer}.{norm}", {"weight": ones})
    add("model.norm", {"weight": torch.ones(HIDDEN, dtype=torch.bfloat16)})
    add("lm_head", plain(VOCAB, HIDDEN))
    return tensors


def gpt_oss() -> Tensors:
    def bfloat16(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02)

    def byte(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8)

    tensors = {
        "model.embed_tokens.weight": bfloat16(VOCAB, HIDDEN),
        "model.norm.weight": bfloat16(HIDDEN),
        "lm_head.weight": bfloat16(VOCAB, HIDDEN),
    }
    for layer in range(GPT_OSS["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        for name, (rows, columns) in list(MATRICES.items())[:4]:
            tensors[f"{base}{name}.weight"] = bfloat16(rows, columns)
            tensors[f"{base}{name}.bias"] = bfloat16(rows)
        tensors[base + "self_attn.sinks"] = bfloat16(16)
        tensors[base + "mlp.router.weight"] = bfloat16(EXPERTS, HIDDEN)
        tensors[base + "mlp.router.bias"] = bfloat16(EXPERTS)
        for name, rows in (("gate_up_proj", 2 * HIDDEN), ("down_proj", HIDDEN)):
            expert = f"{base}mlp.experts.{name}"
            tensors[expert + "_blocks"] = byte(EXPERTS, rows, HIDDEN // 32, 16)
            tensors[expert + "_scales"] = torch.full(
                (EXPERTS, rows, HIDDEN // 32), 120, dtype=torch.uint8
            )
            tensors[expert + "_bias"] = bfloat16(EXPERTS, rows)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{base}{norm}.weight"] = bfloat16(HIDDEN)
    return tensors


def write_gguf(path: Path, kind_name: str) -> None:
    """Random blocks with scales in measure; ``Q4_K_M`` keeps v and half of down in Q6_K."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    generator = numpy.random.default_rng(1)
    scales = {kinds.Q4_K: (0, 4), kinds.Q6_K: (208, 210), kinds.Q8_0: (0, 2)}
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in (
        ("context_length", 2048),
        ("embedding_length", HIDDEN),
        ("block_count", LAYERS),
        ("feed_forward_length", INNER),
        ("attention.head_count", 16),
        ("attention.head_count_kv", 8),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)

    def add(name: str, rows: int, columns: int, kind: Any) -> None:
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        width = columns // block * nbytes
        data = generator.integers(0, 256, (rows, columns // block, nbytes), dtype=numpy.uint8)
        first, last = scales[kind]
        some = generator.uniform(0.001, 0.002, (rows, columns // block, (last - first) // 2))
        data[..., first:last] = some.astype(numpy.float16).view(numpy.uint8)
        writer.add_tensor(name, data.reshape(rows, width), raw_dtype=kind)

    is_mixed = kind_name == "Q4_K_M"
    usual = kinds.Q4_K if is_mixed else kinds[kind_name]
    names = dict(zip(MATRICES, ["attn_q", "attn_k", "attn_v", "attn_output"], strict=False))
    names |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    add("token_embd.weight", VOCAB, HIDDEN, usual)
    for layer in range(LAYERS):
        for name, (rows, columns) in MATRICES.items():
            more = is_mixed and ("v_proj" in name or ("down" in name and layer % 2 == 0))
            kind = kinds.Q6_K if more else usual
            add(f"blk.{layer}.{names[name]}.weight", rows, columns, kind)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", numpy.ones(HIDDEN, numpy.float32))
    writer.add_tensor("output_norm.weight", numpy.ones(HIDDEN, numpy.float32))
    add("output.weight", VOCAB, HIDDEN, kinds.Q6_K if is_mixed else usual)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantised(**values: Any) -> dict[str, Any]:
    return {**LLAMA, "quantization_config": values}


_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
_GPTQ = _quantised(quant_method="gptq", bits=4, group_size=GROUP, desc_act=False)
_COMPRESSED = _quantised(
    quant_method="compressed-tensors",
    format="pack-quantized",
    config_groups={"group_0": {"targets": ["Linear"], "weights": _WEIGHTS}},
)


@dataclass(frozen=True, slots=True)
class Case:
    """A way to store the model; ``quantization`` is on the fly. ``of``: another case's files."""

    config: dict[str, Any] | None = None
    tensors: Callable[[], Tensors] | None = None
    layout: str = "one"
    quantization: str | None = None
    dtype: str = "bfloat16"
    of: str | None = None
    gguf: str | None = None


CASES = {
    "bfloat16": Case(LLAMA, lambda: llama(plain)),
    "bfloat16, 4 shards": Case(LLAMA, lambda: llama(plain), layout="shards"),
    "bfloat16, .bin": Case(LLAMA, lambda: llama(plain), layout="bin"),
    "bfloat16 as float32": Case(of="bfloat16", dtype="float32"),
    "on the fly int8": Case(of="bfloat16", quantization="int8"),
    "on the fly int4": Case(of="bfloat16", quantization="int4"),
    "on the fly fp8": Case(of="bfloat16", quantization="fp8"),
    "on the fly int8, .bin": Case(of="bfloat16, .bin", quantization="int8"),
    "gptq": Case(_GPTQ, lambda: llama(gptq)),
    "gptq, act-order": Case(_GPTQ, lambda: llama(lambda n, k: gptq(n, k, act_order=True))),
    "gptq, k plain": Case(_GPTQ, lambda: llama(gptq, k_proj=plain)),
    "awq": Case(_quantised(quant_method="awq", bits=4, group_size=GROUP), lambda: llama(awq)),
    "squeezellm": Case(_quantised(quant_method="squeezellm", wbits=4), lambda: llama(squeezellm)),
    "compressed-tensors": Case(_COMPRESSED, lambda: llama(compressed)),
    "fp8": Case(
        _quantised(quant_method="fp8", weight_block_size=[GROUP, GROUP]), lambda: llama(fp8)
    ),
    "bitsandbytes nf4": Case(_quantised(quant_method="bitsandbytes"), lambda: llama(nf4)),
    "bitsandbytes int8": Case(_quantised(quant_method="bitsandbytes"), lambda: llama(llm_int8)),
    "mxfp4": Case(GPT_OSS, gpt_oss),
    "gguf Q4_K_M": Case(gguf="Q4_K_M"),
    "gguf Q4_K": Case(gguf="Q4_K"),
    "gguf Q8_0": Case(gguf="Q8_0"),
}


def write(name: str, work: Path) -> Path:
    """The case's checkpoint, made if it is not there."""
    case = CASES[name]
    if case.of is not None:
        return write(case.of, work)
    path = work / name.replace(", ", "-").replace(" ", "-").replace("/", "-")
    if case.gguf is not None:
        path = path.with_suffix(".gguf")
        if not path.exists():
            write_gguf(path, case.gguf)
        return path
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    assert case.config is not None
    assert case.tensors is not None
    torch.manual_seed(1)
    _write_tensors(path, case.tensors(), case.layout)
    (path / "config.json").write_text(json.dumps(case.config))
    return path


def _write_tensors(path: Path, tensors: Tensors, layout: str) -> None:
    if layout == "bin":
        torch.save(tensors, path / "pytorch_model.bin")
    elif layout == "one":
        save_file(tensors, path / "model.safetensors")
    else:
        names = list(tensors)
        size = math.ceil(len(names) / 4)
        shards = {f"model-{n}.safetensors": names[n * size : (n + 1) * size] for n in range(4)}
        for file, some in shards.items():
            save_file({name: tensors[name] for name in some}, path / file)
        index = {"weight_map": {name: file for file, some in shards.items() for name in some}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


def resident() -> tuple[int, int]:
    """Bytes of this process that are its own, and those that are files'."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    return int(fields["RssAnon"].split()[0]) * 1024, int(fields["RssFile"].split()[0]) * 1024


def load(name: str, work: Path) -> None:
    """In a process of its own: loads the case, and prints what it took as JSON."""
    import threading
    import time

    import streamserve_kernels
    from streamserve.models import load_config, load_model
    from streamserve.models.parameters import decoder_modules

    case, path = CASES[name], write(name, work)
    device, dtype = torch.device("cpu"), getattr(torch, case.dtype)
    config = load_config(path)
    kernels = streamserve_kernels.load(device, dtype=dtype)
    before, peak, done = resident(), [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[:] = map(max, peak, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    decoder = load_model(
        path, dtype=dtype, device=device, kernels=kernels, quantization=case.quantization
    )
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin")]
    status = Path("/proc/self/status").read_text().splitlines()
    high = next(line for line in status if line.startswith("VmHWM"))
    largest = max(module.numel for module in decoder_modules(config.spec))
    result = {
        "checkpoint": sum(file.stat().st_size for file in files),
        "packed": decoder.nbytes,
        "peak": peak[0] - before[0],
        "after": resident()[0] - before[0],
        "mapped": peak[1] - before[1],
        "VmHWM": int(high.split()[1]) * 1024,
        "matrix": largest * dtype.itemsize,
        "seconds": seconds,
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are written")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    options = parser.parse_args()
    if options.child:
        load(options.cases[0], options.work)
        return
    columns = ("checkpoint", "packed", "matrix", "peak", "after", "mapped", "VmHWM")
    print(
        "| stored | "
        + " | ".join(columns)
        + " | over | seconds |\n"
        + "|---" * (len(columns) + 3)
        + "|"
    )
    for name in options.cases or CASES:
        write(name, options.work)
        child = [sys.executable, "-m", "tools.loading_peaks", "--child", name]
        done = subprocess.run(
            [*child, "--work", str(options.work)],
            env={**os.environ, "PYTHONPATH": f".{os.pathsep}kernels"},
            check=True,
            capture_output=True,
            text=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        limit = max(found["checkpoint"], found["packed"]) + found["matrix"]
        cells = " | ".join(f"{found[column] / MB:.0f}" for column in columns)
        print(
            f"| {name} | {cells} | {found['peak'] / limit:.2f} | {found['seconds']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
