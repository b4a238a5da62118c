"""GGUF files of transformers' models, written with llama.cpp's own package as its converter does.

Names come from the package's map, what is done to rows from ``conversion/*.py`` of llama.cpp. The
model is given the weights that the file stands for, so that it is the reference for what is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.quants import dequantize, quantize
from torch import Tensor

_PERMUTED = ("llama", "smollm3", "baichuan", "deepseek")
F32 = gguf.GGMLQuantizationType.F32
Kind = gguf.GGMLQuantizationType
# What the package can read but not write: random blocks stand for weights, with scales in measure.
_K_SCALES = {
    Kind.Q2_K: (80, 84),
    Kind.Q3_K: (108, 110),
    Kind.Q4_K: (0, 4),
    Kind.Q5_K: (0, 4),
    Kind.Q6_K: (208, 210),
    Kind.IQ4_XS: (0, 2),
    Kind.IQ4_NL: (0, 2),
}


def settings_of(model: Any) -> Any:
    """The model's config; that of a reference of our own by transformers' names."""
    config = model.config
    if not isinstance(config, dict):
        return config
    layers, inner = config.get("num_layers"), config.get("ffn_hidden_size")
    defaults = {
        "tie_word_embeddings": False,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "max_position_embeddings": config.get("seq_length", config.get("model_max_length")),
    }
    return SimpleNamespace(**{**defaults, **config})


def neighbours_together(rows: int, heads: int) -> np.ndarray:
    """`LlamaModel.permute`: which row of transformers' is each row of the file."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def stacked_qkv(heads: int, kv_heads: int, size: int) -> np.ndarray:
    """`FalconModel` and `GPTNeoXModel`: groups of (queries, key, value) to all q, all k, all v."""
    rows = np.arange((heads + 2 * kv_heads) * size).reshape(kv_heads, heads // kv_heads + 2, size)
    return np.concatenate([rows[:, :-2].ravel(), rows[:, -2].ravel(), rows[:, -1].ravel()])


def write_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    architecture: str,
    values: Mapping[str, Any],
    *,
    kind: Callable[[str], Kind] = lambda name: F32,
    extra: Mapping[str, np.ndarray] | None = None,
    text: Callable[[gguf.GGUFWriter], None] | None = None,
    **options: Any,
) -> gguf.GGUFWriter:
    """Writes ``path``; ``kind`` says how a tensor of the file's name is held.

    ``values`` are metadata behind the architecture's name, ``extra`` tensors as they are, ``text``
    adds the tokenizer. Matrices only are quantised.
    """
    writer = gguf.GGUFWriter(str(path), architecture, **options)
    for key, value in values.items():
        _add(writer, f"{architecture}.{key}", value)
    if text is not None:
        text(writer)
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    config = settings_of(model)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    generator = np.random.default_rng(3)
    for name, tensor in _tensors(model, architecture):
        held = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert held is not None, name
        _write(writer, held, tensor, config, architecture, kind, generator)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return writer


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


_EXPERT = re.compile(r"(.*mlp\.experts)\.\d+\.(\w+\.weight)$")


def _tensors(
    model: transformers.PreTrainedModel, architecture: str
) -> list[tuple[str, list[Tensor]]]:
    """Names with transformers' tensors, experts of one layer together; a tied head is left out."""
    found: dict[str, list[Tensor]] = {}
    tied = settings_of(model).tie_word_embeddings
    for name, parameter in model.named_parameters():
        data = parameter.data
        base, _, leaf = name.rpartition(".")
        if tied and name == "lm_head.weight":
            continue
        if architecture == "gpt-oss" and base.endswith("experts"):
            found |= _clamped_experts(base, leaf, data)
        elif leaf == "gate_up_proj":
            gate, up = data.chunk(2, dim=1)
            found[f"{base}.gate_proj.weight"] = list(gate)
            found[f"{base}.up_proj.weight"] = list(up)
        elif name.endswith("mlp.experts.down_proj"):
            found[name + ".weight"] = list(data)
        elif (expert := _EXPERT.match(name)) is not None:
            found.setdefault(f"{expert[1]}.{expert[2]}", []).append(data)
        elif name.endswith("W_pack.weight"):
            for part, rows in zip("qkv", data.chunk(3), strict=True):
                found[name.replace("W_pack", f"{part}_proj")] = [rows]
        elif leaf == "sinks":
            found[name + ".weight"] = [data]
        elif architecture == "gpt2" and name.endswith(
            ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        ):
            found[name] = [data.t()]
        else:
            found[name.removeprefix("transformer.") if architecture == "chatglm" else name] = [data]
    return list(found.items())


def _clamped_experts(base: str, leaf: str, data: Tensor) -> dict[str, list[Tensor]]:
    """gpt-oss keeps ``[in, out]``, gates and ups in turns."""
    suffix = "bias" if leaf.endswith("_bias") else "weight"
    rows = data if suffix == "bias" else data.transpose(1, 2)
    if leaf.startswith("down"):
        return {f"{base}.down_proj.{suffix}": list(rows)}
    return {
        f"{base}.gate_proj.{suffix}": list(rows[:, ::2]),
        f"{base}.up_proj.{suffix}": list(rows[:, 1::2]),
    }


def _order(held: str, rows: int, config: Any, architecture: str) -> np.ndarray | None:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    if architecture in _PERMUTED and ".attn_q." in held:
        return neighbours_together(rows, heads)
    if architecture in _PERMUTED and ".attn_k." in held:
        return neighbours_together(rows, kv_heads)
    if architecture == "falcon" and ".attn_qkv." in held:
        kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1
        return stacked_qkv(heads, kv_heads, rows // (heads + 2 * kv_heads))
    if architecture == "gptneox" and ".attn_qkv." in held:
        return stacked_qkv(heads, heads, rows // (3 * heads))
    return None


def _write(
    writer: gguf.GGUFWriter,
    held: str,
    tensors: list[Tensor],
    config: Any,
    architecture: str,
    kind: Callable[[str], Kind],
    generator: np.random.Generator,
) -> None:
    order = _order(held, tensors[0].shape[0], config, architecture)
    arrays = [tensor.numpy() if order is None else tensor.numpy()[order] for tensor in tensors]
    array = arrays[0] if len(arrays) == 1 and "_exps." not in held else np.stack(arrays)
    if architecture.startswith("gemma") and held.endswith("norm.weight"):
        array = array + np.float32(1)
    if held.endswith("ffn_gate_inp_shexp.weight"):
        array = array[0]
    chosen = kind(held) if array.ndim > 1 and held.endswith("weight") else F32
    if chosen == F32:
        writer.add_tensor(held, np.ascontiguousarray(array, dtype=np.float32))
        return
    data = _quantised(np.ascontiguousarray(array, dtype=np.float32), chosen, generator)
    writer.add_tensor(held, data, raw_dtype=chosen)
    weights = dequantize(data.view(np.uint8), chosen).reshape(array.shape)
    for tensor, weight in zip(tensors, [weights] if array.ndim == 2 else weights, strict=True):
        tensor[slice(None) if order is None else torch.from_numpy(order)] = torch.from_numpy(weight)


def _quantised(array: np.ndarray, kind: Kind, generator: np.random.Generator) -> np.ndarray:
    if kind not in _K_SCALES:
        return quantize(array, kind)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    count = array.size // block
    data = generator.integers(0, 256, (count, nbytes), dtype=np.uint8)
    start, end = _K_SCALES[kind]
    # Some kinds' codes and scales are larger integers, so that a unit is smaller.
    unit = {Kind.Q6_K: 2e-4, Kind.Q3_K: 2e-4, Kind.IQ4_XS: 1e-4}.get(kind, 2e-3)
    scales = (unit * generator.random((count, (end - start) // 2))).astype(np.float16)
    data[:, start:end] = scales.view(np.uint8)
    return data.reshape(*array.shape[:-1], -1)
