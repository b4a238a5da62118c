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

from tests.models.gguf_gemma4 import name_of_scale

_PERMUTED = (
    "llama",
    "mistral3",
    "smollm3",
    "baichuan",
    "deepseek",
    "granite",
    "granitemoe",
    "granitehybrid",
    "olmo",
    "arcee",
)
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


_WITH_DELTA_NETS = ("qwen35", "qwen35moe", "qwen3next")


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


def tiled_heads(config: Any, size: int) -> np.ndarray:
    """`_reorder_v_heads`: which row, of those of all value heads, is each row of the file."""
    key_heads = config.linear_num_key_heads
    rows = np.arange(config.linear_num_value_heads * size)
    return rows.reshape(key_heads, -1, size).swapaxes(0, 1).reshape(-1)


def _stacked_qkvz(config: Any) -> tuple[np.ndarray, np.ndarray]:
    """`Qwen3NextModel`: rows of q, k and v, and of z, of what has them key head by key head."""
    key_heads, size = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // key_heads * config.linear_value_head_dim
    rows = np.arange(key_heads * 2 * (size + values)).reshape(key_heads, -1)
    q, k, v, z = np.split(rows, [size, 2 * size, 2 * size + values], axis=1)
    return np.concatenate([part.ravel() for part in (q, k, v)]), z.ravel()


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
    whole_qkvz: bool = False,
    named: Callable[[str], str | None] = lambda name: None,
    **options: Any,
) -> gguf.GGUFWriter:
    """Writes ``path``; ``kind`` says how a tensor of the file's name is held.

    ``values`` are metadata behind the architecture's name, ``extra`` tensors as they are, ``text``
    adds the tokenizer. Matrices only are quantised. With ``whole_qkvz`` those of a delta net stay
    one, as they did at first. ``named`` gives the names that the package's map lacks.
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
    for name, tensor in _tensors(model, architecture, whole_qkvz):
        held = named(name) or name_of_scale(name)
        held = held or names.get_name(name, try_suffixes=(".weight", ".bias"))
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


_CORRECTIONS = ("e_score_correction_bias", "expert_bias")
_BUFFERS = (*_CORRECTIONS, "layer_scalar")
_OF_HEAD = re.compile(r"(.*layernorm)\.norms\.\d+(\.weight)$")
_EXPERT = re.compile(r"(.*mlp\.experts)\.\d+\.(\w+\.weight)$")


def _tensors(
    model: transformers.PreTrainedModel, architecture: str, whole_qkvz: bool
) -> list[tuple[str, list[Tensor]]]:
    """Names with transformers' tensors, experts of one layer together; a tied head is left out."""
    found: dict[str, list[Tensor]] = {}
    tied = settings_of(model).tie_word_embeddings
    buffers = ((name, b) for name, b in model.named_buffers() if name.endswith(_BUFFERS))
    for named, parameter in (*model.named_parameters(), *buffers):
        data = parameter.data
        name = named.replace("block_sparse_moe", "mlp")  # as Qwen has them
        name = name.replace("feed_forward.experts", "mlp.experts")
        if architecture.startswith("nemotron_h"):
            of_experts = ".mixer.experts" in name or name.endswith(_CORRECTIONS)
            before, after = (".mixer.", ".mlp.") if of_experts else ("model.", "backbone.")
            name = name.replace(before, after, 1)
        base, _, leaf = name.rpartition(".")
        if tied and name == "lm_head.weight":
            continue
        if architecture == "gpt-oss" and base.endswith("experts"):
            found |= _clamped_experts(base, leaf, data)
        elif architecture == "gemma4" and leaf in ("gate_up_proj", "down_proj", "layer_scalar"):
            found[name + ".weight"] = [data] if leaf == "layer_scalar" else list(data)
        elif architecture == "nemotron_h_moe" and base.endswith(".experts"):
            found[name + ".weight"] = list(data)
        elif leaf == "gate_up_proj":
            gate, up = data.chunk(2, dim=1)
            found[f"{base}.gate_proj.weight"] = list(gate)
            found[f"{base}.up_proj.weight"] = list(up)
        elif name.endswith("mlp.experts.down_proj"):
            found[name + ".weight"] = list(data)
        elif (head := _OF_HEAD.match(name)) is not None:
            found.setdefault(head[1] + head[2], []).append(data)
        elif (expert := _EXPERT.match(name)) is not None:
            found.setdefault(f"{expert[1]}.{expert[2]}", []).append(data)
        elif name.endswith("W_pack.weight"):
            for part, rows in zip("qkv", data.chunk(3), strict=True):
                found[name.replace("W_pack", f"{part}_proj")] = [rows]
        elif name.endswith("kv_b_proj.weight") and architecture == "deepseek2":
            found |= _heads_apart(name, model.config, data)
        elif name.endswith("in_proj_qkvz.weight") and not whole_qkvz:
            found |= {name.replace("qkvz", part): [data] for part in ("qkv", "z")}
        elif base.endswith("shared_mlp.input_linear"):
            for part, rows in zip(("gate", "up"), data.chunk(2), strict=True):
                found[f"{_shared(base, model)}.{part}_proj.weight"] = [rows]
        elif base.endswith("shared_mlp.output_linear"):
            found[f"{_shared(base, model)}.down_proj.weight"] = [data]
        elif leaf.endswith(_CORRECTIONS):
            layer, _, _ = name.rpartition(".mlp." if ".mlp." in name else ".feed_forward.")
            found[f"{layer}.mlp.gate.e_score_correction.bias"] = [data.flatten()]
        elif leaf == "dt_bias":
            found[f"{base}.dt_proj.bias"] = [data]
        elif leaf == "sinks":
            found[name + ".weight"] = [data]
        elif architecture == "gpt2" and name.endswith(
            ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        ):
            found[name] = [data.t()]
        else:
            is_bare = architecture in ("bloom", "chatglm")
            found[name.removeprefix("transformer.") if is_bare else name] = [data]
    return list(found.items())


def _heads_apart(name: str, config: Any, data: Tensor) -> dict[str, list[Tensor]]:
    """`DeepseekV2Model`: keys, turned, and values of each head."""
    sizes = (config.qk_nope_head_dim, config.v_head_dim)
    heads = data.view(config.num_attention_heads, sum(sizes), -1)
    keys, values = heads.split_with_sizes(sizes, dim=1)
    return {
        name.replace("kv_b_proj", "k_b_proj"): [keys.transpose(1, 2)],
        name.replace("kv_b_proj", "v_b_proj"): [values],
    }


def _num_groups(config: Any) -> int:
    groups = getattr(config, "mamba_n_groups", None)
    return int(groups or config.n_groups)


def _shared(base: str, model: Any) -> str:
    """`GraniteMoeModel`: the only MLP, where a hybrid has no experts."""
    has_experts = model.config.num_local_experts
    return base.partition("shared_mlp")[0] + ("mlp.shared_expert" if has_experts else "mlp")


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
    if architecture == "gemma4":  # whose layers have numbers of key and value heads of their own
        return None
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    if architecture in _PERMUTED and ".attn_q." in held:
        return neighbours_together(rows, heads)
    if architecture in _PERMUTED and ".attn_k." in held:
        return neighbours_together(rows, kv_heads)
    if architecture == "falcon" and ".attn_qkv." in held:
        kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1
        return stacked_qkv(heads, kv_heads, rows // (heads + 2 * kv_heads))
    if architecture in ("gptneox", "bloom") and ".attn_qkv." in held:
        return stacked_qkv(heads, heads, rows // (3 * heads))
    if architecture in _WITH_DELTA_NETS:
        stem = re.sub(r"^blk\.\d+\.|\.(weight|bias)$", "", held)
        return _delta_net_order(stem, config, architecture)
    return None


def _delta_net_order(held: str, config: Any, architecture: str) -> np.ndarray | None:
    if architecture == "qwen3next":
        qkv, z = _stacked_qkvz(config)
        return {"attn_qkv": qkv, "attn_gate": z}.get(held)
    values = tiled_heads(config, config.linear_value_head_dim)
    keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    if held in ("attn_qkv", "ssm_conv1d"):
        return np.concatenate([np.arange(keys), keys + values])
    if held in ("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt"):
        return tiled_heads(config, 1)
    return values if held == "attn_gate" else None


def _columns(held: str, config: Any, architecture: str) -> np.ndarray | slice:
    if architecture in ("qwen35", "qwen35moe") and ".ssm_out." in held:
        return tiled_heads(config, config.linear_value_head_dim)
    return slice(None)


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
    columns = _columns(held, config, architecture)
    is_mixture = "_exps." in held and not held.endswith(".scale")
    array = arrays[0] if len(arrays) == 1 and not is_mixture else np.stack(arrays)
    has_offset = architecture in ("gemma", "gemma2", "gemma3", "nemotron")
    has_offset = has_offset or architecture in _WITH_DELTA_NETS
    if has_offset and held.endswith("norm.weight") and "ssm_norm" not in held:
        array = array + np.float32(1)
    if held.endswith("ssm_a"):
        array = -np.exp(array)
    if held.endswith(("ssm_conv1d.weight", "shortconv.conv.weight")):
        array = array[:, 0]
    if held.endswith(("ssm_a", "ssm_d")) and architecture not in _WITH_DELTA_NETS:
        array = array[:, None]
    if held.endswith("ssm_norm.weight") and architecture not in _WITH_DELTA_NETS:
        array = array.reshape(_num_groups(config), -1)
    if held.endswith("ffn_gate_inp_shexp.weight"):
        array = array[0]
    array = array[..., columns]
    chosen = kind(held) if array.ndim > 1 and held.endswith("weight") else F32
    if chosen == F32:
        writer.add_tensor(held, np.ascontiguousarray(array, dtype=np.float32))
        return
    data = _quantised(np.ascontiguousarray(array, dtype=np.float32), chosen, generator)
    writer.add_tensor(held, data, raw_dtype=chosen)
    weights = dequantize(data.view(np.uint8), chosen).reshape(array.shape)
    for tensor, weight in zip(tensors, [weights] if array.ndim == 2 else weights, strict=True):
        in_order = np.empty_like(weight)
        in_order[:, columns] = weight
        tensor[slice(None) if order is None else torch.from_numpy(order)] = torch.from_numpy(
            in_order
        )


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
