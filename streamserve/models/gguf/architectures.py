"""What a GGUF file holds, in the words of our families.

A file's architecture is llama.cpp's name for it, and its values have llama.cpp's names. They become
the values of a ``config.json`` of transformers, so that a family's own reading makes the spec.
What the converter did to the weights is undone when they are read (`tensors`): then a spec is the
same from either kind of checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streamserve.errors import UnsupportedModelError
from streamserve.models.names import DeltaLayout, QkvLayout

if TYPE_CHECKING:
    from streamserve.models.gguf.reading import Reading

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """``family`` is transformers' architecture; ``values`` what its config has beside `_common`.

    ``also``: others whose files are of this one too: ``values`` says which, or it does not matter.
    ``permuted``: the rows of q and k are stored so that neighbours are rotated together.
    ``norm_offset`` was added to the weights of norms. ``windows``: the family has a window.
    ``tiled``: a delta net's value heads are stored one of each key head, then the next of each.
    ``num_kv_heads``: of each layer that attends. ``read``: names of `_REFUSED` whose values count
    here, or change nothing.
    """

    family: str
    values: Callable[[Reading], Values] = lambda reading: {}
    permuted: bool = False
    norm_offset: float = 0.0
    windows: bool = False
    also: tuple[str, ...] = ()
    tiled: bool = False
    num_kv_heads: Callable[[Reading], int | None] = lambda reading: reading.num_kv_heads
    read: tuple[str, ...] = ()
    qkv_layout: QkvLayout = "stacked"
    delta_layout: DeltaLayout = "stacked"


# What would change an answer and is not built, by the value that changes nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0, 0.0),
    "attention.max_alibi_bias": (0, 0.0),
    "attention.scale": (),
    "attention.shared_kv_layers": (0,),
    "embedding_scale": (),
    "expert_gating_func": (1,),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "logit_scale": (1.0,),
    "nextn_predict_layers": (0,),
    "residual_scale": (1.0,),
    "rope.dimension_sections": (),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def find_architecture(reading: Reading) -> Architecture:
    """Raises UnsupportedModelError, which names what the file is and what works."""
    found = ARCHITECTURES.get(reading.name)
    path = reading.file.path
    if found is None:
        raise UnsupportedModelError(
            f"{path}: architecture {reading.name!r} is not supported in a GGUF file; "
            f"these are: {', '.join(sorted(ARCHITECTURES))}"
        )
    for name, allowed in _REFUSED.items():
        key = reading.key(name)
        if name in found.read or key not in reading.file.metadata:
            continue
        value = reading.file.metadata.value(key)
        if value not in allowed:
            raise UnsupportedModelError(f"{path}: {key} {value!r} is not supported")
    if not found.windows and reading.integer_or(0, "attention.sliding_window"):
        raise UnsupportedModelError(
            f"{path}: {reading.key('attention.sliding_window')} "
            f"{reading.integer('attention.sliding_window')} is not supported for this architecture"
        )
    return found


def config_values(reading: Reading, architecture: Architecture) -> Values:
    """The file's values as transformers' ``config.json`` would have them."""
    common = _common(reading, architecture.num_kv_heads(reading))
    values = {**common, **architecture.values(reading)}
    [named] = values.setdefault("architectures", [architecture.family])
    assert named in (architecture.family, *architecture.also)
    return {name: value for name, value in values.items() if value is not None}


def _common(reading: Reading, num_kv_heads: int | None) -> Values:
    """What every family has, by all of the names that one or the other looks for."""
    head_size = reading.head_size
    layer_eps = reading.optional_number("attention.layer_norm_epsilon")
    intermediate_size = reading.optional_integer("feed_forward_length")
    embedding = reading.file.tensors.get("token_embd.weight")
    vocab_size = reading.optional_integer("vocab_size") if embedding is None else embedding.shape[0]
    values: Values = {
        "vocab_size": vocab_size,
        "hidden_size": reading.integer("embedding_length"),
        "num_hidden_layers": reading.num_layers,
        "num_attention_heads": reading.integer("attention.head_count"),
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_size,
        "intermediate_size": intermediate_size or None,
        "n_inner": intermediate_size or None,
        "max_position_embeddings": reading.integer("context_length"),
        "rms_norm_eps": reading.optional_number("attention.layer_norm_rms_epsilon"),
        "layer_norm_eps": layer_eps,
        "layer_norm_epsilon": layer_eps,
        "norm_epsilon": layer_eps,
        "rope_theta": reading.number_or(10_000.0, "rope.freq_base"),
        "rope_scaling": _rope_scaling(reading),
        "tie_word_embeddings": not reading.has_tensor("output.weight"),
        "attention_bias": _has_bias(reading, "attn_q") or _has_bias(reading, "attn_qkv"),
        "mlp_bias": _has_bias(reading, "ffn_up"),
    }
    rotary_dim = reading.integer_or(head_size, "rope.dimension_count")
    if rotary_dim != head_size:
        values["partial_rotary_factor"] = _factor(rotary_dim, head_size)
    return values


def _has_bias(reading: Reading, module: str) -> bool:
    return reading.has_tensor(f"blk.0.{module}.bias")


def _factor(rotary_dim: int, head_size: int) -> float:
    """The share of a head that turns, such that the family counts ``rotary_dim`` elements."""
    factor = rotary_dim / head_size
    while int(head_size * factor) < rotary_dim:
        factor = math.nextafter(factor, 2.0)
    return factor


def _rope_scaling(reading: Reading) -> Values | None:
    context = reading.integer("context_length")
    original = reading.integer_or(context, "rope.scaling.original_context_length")
    path, factor = reading.file.path, reading.optional_number("rope.scaling.factor")
    if reading.has_tensor("rope_freqs.weight"):
        # What Llama 3's stretch makes of each frequency, computed by the converter.
        factors = reading.floats("rope_freqs.weight")
        return _longrope(factors, factors, original, 1.0)
    if reading.has_tensor("rope_factors_long.weight"):
        short, long = (reading.floats(f"rope_factors_{kind}.weight") for kind in ("short", "long"))
        return _longrope(short, long, original, reading.number_or(1.0, "rope.scaling.attn_factor"))
    kind = reading.file.metadata.optional_text(reading.key("rope.scaling.type"))
    if kind is None and (older := reading.optional_number("rope.scale_linear")) is not None:
        kind, factor = "linear", older
    if kind in (None, "none") or (kind == "linear" and factor in (None, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": reading.optional_number("rope.scaling.yarn_attn_factor"),
            "beta_fast": reading.optional_number("rope.scaling.yarn_beta_fast"),
            "beta_slow": reading.optional_number("rope.scaling.yarn_beta_slow"),
        }
    raise UnsupportedModelError(
        f"{path}: {reading.key('rope.scaling.type')} {kind!r} is not supported without the "
        "tensors rope_factors_long and rope_factors_short; these are: none, linear, yarn"
    )


def _longrope(
    short: list[float], long: list[float], original: int, attention_factor: float
) -> Values:
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "original_max_position_embeddings": original,
        "attention_factor": attention_factor,
        "short_factor": short,
        "long_factor": long,
    }


def _llama(reading: Reading) -> Values:
    num_experts = reading.integer_or(0, "expert_count")
    window = reading.integer_or(0, "attention.sliding_window")
    if num_experts:
        return {
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": num_experts,
            "num_experts_per_tok": reading.integer("expert_used_count"),
            "sliding_window": window or None,
        }
    if window:
        return {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    return {}


def _experts(reading: Reading, *, renormalise: bool) -> Values:
    size = reading.optional_integer("expert_feed_forward_length")
    used = reading.integer("expert_used_count")
    metadata, key = reading.file.metadata, reading.key("expert_weights_norm")
    stated = metadata.optional_flag(key)
    layers = range(reading.num_layers)
    return {
        "num_experts": reading.integer("expert_count"),
        "num_experts_per_tok": used,
        # As llama.cpp reads files from before there was a key.
        "moe_intermediate_size": size or reading.integer("feed_forward_length") // used,
        "norm_topk_prob": renormalise if stated is None else stated,
        "mlp_only_layers": [n for n in layers if reading.has_tensor(f"blk.{n}.ffn_up.weight")],
    }


def _qwen2_moe(reading: Reading, *, renormalise: bool = False) -> Values:
    shared = reading.file.tensors.get("blk.0.ffn_up_shexp.weight")
    size = reading.optional_integer("expert_shared_feed_forward_length")
    return {
        **_experts(reading, renormalise=renormalise),
        "shared_expert_intermediate_size": size or (shared.shape[0] if shared else None),
        "qkv_bias": _has_bias(reading, "attn_q") or _has_bias(reading, "attn_qkv"),
    }


def _delta_net(reading: Reading) -> Values:
    num_value_heads = reading.count("ssm.time_step_rank")
    rotary_dim = reading.integer_or(reading.head_size, "rope.dimension_count")
    recurrent = reading.file.metadata.numbers(reading.key("attention.recurrent_layers"))
    kinds = ("full_attention", "linear_attention")
    return {
        "linear_num_key_heads": reading.count("ssm.group_count"),
        "linear_num_value_heads": num_value_heads,
        "linear_key_head_dim": reading.integer("ssm.state_size"),
        "linear_value_head_dim": reading.integer("ssm.inner_size") // num_value_heads,
        "linear_conv_kernel_dim": reading.integer("ssm.conv_kernel"),
        "full_attention_interval": reading.optional_integer("full_attention_interval"),
        "layer_types": [kinds[bool(r)] for r in recurrent[: reading.num_layers]] or None,
        "partial_rotary_factor": _factor(rotary_dim, reading.head_size),
        "mtp_num_hidden_layers": reading.integer_or(0, "nextn_predict_layers"),
    }


def _delta_net_moe(reading: Reading) -> Values:
    return {**_delta_net(reading), **_qwen2_moe(reading, renormalise=True)}


def _some_kv_heads(reading: Reading) -> int | None:
    """Where layers without any are those that do not attend."""
    key = reading.key("attention.head_count_kv")
    found = sorted(set(reading.file.metadata.numbers(key)) - {0})
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{reading.file.path}: {key} differs among the layers that attend ({found}), "
            "which is not supported"
        )
    return found[0] if found else None


def _lfm2(reading: Reading) -> Values:
    heads = reading.file.metadata.numbers(reading.key("attention.head_count_kv"))
    return {
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "conv_L_cache": reading.integer("shortconv.l_cache"),
        "norm_eps": reading.optional_number("attention.layer_norm_rms_epsilon"),
        "block_auto_adjust_ff_dim": False,
    }


def _layer_types(reading: Reading) -> list[str] | None:
    """Which layers have a window, where the file lists them."""
    key = reading.key("attention.sliding_window_pattern")
    if not reading.file.metadata.is_array(key):
        return None
    kinds = ("full_attention", "sliding_attention")
    return [kinds[bool(windowed)] for windowed in reading.file.metadata.numbers(key)]


def _every(reading: Reading) -> int | None:
    key = "attention.sliding_window_pattern"
    is_array = reading.file.metadata.is_array(reading.key(key))
    return None if is_array else reading.optional_integer(key)


def _gemma_scale(reading: Reading, layers_of_27b: int) -> int:
    """The largest of each generation counts a head as its share of the hidden size."""
    if reading.integer("block_count") == layers_of_27b:
        return reading.integer("embedding_length") // reading.integer("attention.head_count")
    return reading.head_size


def _gemma2(reading: Reading) -> Values:
    return {
        "sliding_window": reading.integer_or(4096, "attention.sliding_window"),
        "layer_types": _layer_types(reading),
        "attn_logit_softcapping": reading.number_or(50.0, "attn_logit_softcapping"),
        "final_logit_softcapping": reading.number_or(30.0, "final_logit_softcapping"),
        "query_pre_attn_scalar": _gemma_scale(reading, 46),
    }


def _gemma3(reading: Reading) -> Values:
    scaling = _rope_scaling(reading) or {"rope_type": "default"}
    everywhere = {**scaling, "rope_theta": reading.number_or(1e6, "rope.freq_base")}
    nearby = {"rope_type": "default", "rope_theta": reading.number_or(1e4, "rope.freq_base_swa")}
    window = reading.integer_or(0, "attention.sliding_window")
    layers = reading.integer("block_count")
    return {
        "sliding_window": window or None,
        "sliding_window_pattern": _every(reading),
        "layer_types": _layer_types(reading) if window else ["full_attention"] * layers,
        "final_logit_softcapping": reading.optional_number("final_logit_softcapping") or None,
        "query_pre_attn_scalar": _gemma_scale(reading, 62),
        "rope_scaling": {"full_attention": everywhere, "sliding_attention": nearby},
    }


def _phi3(reading: Reading) -> Values:
    return {
        "sliding_window": reading.integer_or(0, "attention.sliding_window") or None,
        "original_max_position_embeddings": reading.optional_integer(
            "rope.scaling.original_context_length"
        ),
    }


def _falcon(reading: Reading) -> Values:
    num_kv_heads = reading.integer_or(1, "attention.head_count_kv")
    has_two_norms = reading.has_tensor("blk.0.attn_norm_2.weight")
    return {
        "new_decoder_architecture": num_kv_heads > 1,
        "multi_query": num_kv_heads == 1,
        "num_kv_heads": num_kv_heads,
        "num_ln_in_parallel_attn": 2 if has_two_norms else 1,
        "parallel_attn": True,
        "ffn_hidden_size": reading.optional_integer("feed_forward_length"),
    }


def _gptneox(reading: Reading) -> Values:
    stated = reading.file.metadata.optional_flag(reading.key("use_parallel_residual"))
    return {"use_parallel_residual": stated is not False}


def _phi2(reading: Reading) -> Values:
    return {"qk_layernorm": reading.has_tensor("blk.0.attn_q_norm.weight")}


def _starcoder2(reading: Reading) -> Values:
    return {"use_bias": _has_bias(reading, "ffn_up"), "hidden_act": "gelu_pytorch_tanh"}


def _qwen(reading: Reading) -> Values:
    """Its ``intermediate_size`` counts both halves of what is gated together, here as there."""
    eps = reading.optional_number("attention.layer_norm_rms_epsilon")
    if eps is None:
        eps = reading.optional_number("attention.layer_norm_epsilon")
    return {
        "kv_channels": reading.head_size,
        "rotary_emb_base": reading.number_or(10_000.0, "rope.freq_base"),
        "layer_norm_epsilon": eps,
        "seq_length": reading.integer("context_length"),
    }


_BAICHUAN_13B = 40


def _baichuan(reading: Reading) -> Values:
    """The 13B models, which llama.cpp tells by their layers, have ALiBi."""
    context = reading.integer("context_length")
    if reading.integer("block_count") == _BAICHUAN_13B:
        return {"max_position_embeddings": None, "model_max_length": context}
    return {"architectures": ["BaiChuanForCausalLM"]}


def _chatglm(reading: Reading) -> Values:
    """GLM 4 in transformers' layout is a file of this architecture too, and the same decoder."""
    num_kv_heads = reading.integer("attention.head_count_kv")
    base = reading.number_or(10_000.0, "rope.freq_base")
    bias = _has_bias(reading, "attn_qkv") or _has_bias(reading, "attn_q")
    return {
        "kv_channels": reading.head_size,
        "multi_query_attention": True,
        "multi_query_group_num": num_kv_heads,
        "add_qkv_bias": bias,
        "ffn_hidden_size": reading.integer("feed_forward_length"),
        "layernorm_epsilon": reading.optional_number("attention.layer_norm_rms_epsilon"),
        "rope_ratio": base / 10_000.0,
        "rotary_dim": reading.integer_or(reading.head_size // 2, "rope.dimension_count"),
        "seq_length": reading.integer("context_length"),
    }


def _deepseek(reading: Reading) -> Values:
    used = reading.integer("expert_used_count")
    stated = reading.file.metadata.optional_flag(reading.key("expert_weights_norm"))
    return {
        "n_routed_experts": reading.integer("expert_count"),
        "n_shared_experts": reading.integer_or(0, "expert_shared_count"),
        "num_experts_per_tok": used,
        "moe_intermediate_size": reading.integer("expert_feed_forward_length"),
        "first_k_dense_replace": reading.integer_or(0, "leading_dense_block_count"),
        "norm_topk_prob": stated is True,
    }


def _gpt_oss(reading: Reading) -> Values:
    scaling = _rope_scaling(reading)
    return {
        "num_local_experts": reading.integer("expert_count"),
        "num_experts_per_tok": reading.integer("expert_used_count"),
        "intermediate_size": reading.integer("expert_feed_forward_length"),
        "sliding_window": reading.integer("attention.sliding_window"),
        "layer_types": _layer_types(reading),
        # Its frequencies are stretched from fractions of pairs on, which no key says.
        "rope_scaling": None if scaling is None else {**scaling, "truncate": False},
    }


# Text turns by one position, whichever of three axes a pair belongs to. Layers that guess further
# tokens are a head of their own.
_DELTA_NET = Architecture(
    "Qwen3_5ForCausalLM",
    _delta_net,
    norm_offset=1.0,
    tiled=True,
    read=("nextn_predict_layers", "rope.dimension_sections"),
    qkv_layout="gated",
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM",
        _llama,
        permuted=True,
        windows=True,
        also=("MistralForCausalLM", "MixtralForCausalLM"),
    ),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "qwen2moe": Architecture("Qwen2MoeForCausalLM", _qwen2_moe),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM", lambda reading: _experts(reading, renormalise=True)
    ),
    "qwen35": _DELTA_NET,
    "qwen35moe": replace(_DELTA_NET, family="Qwen3_5MoeForCausalLM", values=_delta_net_moe),
    "qwen3next": replace(
        _DELTA_NET,
        family="Qwen3NextForCausalLM",
        values=_delta_net_moe,
        tiled=False,
        delta_layout="grouped",
    ),
    "lfm2": Architecture("Lfm2ForCausalLM", _lfm2, num_kv_heads=_some_kv_heads),
    "smollm3": Architecture("SmolLM3ForCausalLM", permuted=True),
    "gemma": Architecture("GemmaForCausalLM", norm_offset=1.0),
    "gemma2": Architecture("Gemma2ForCausalLM", _gemma2, norm_offset=1.0, windows=True),
    "gemma3": Architecture("Gemma3ForCausalLM", _gemma3, norm_offset=1.0, windows=True),
    "phi2": Architecture("PhiForCausalLM", _phi2),
    "phi3": Architecture("Phi3ForCausalLM", _phi3, windows=True),
    "gpt2": Architecture("GPT2LMHeadModel"),
    "gptneox": Architecture("GPTNeoXForCausalLM", _gptneox),
    "starcoder2": Architecture("Starcoder2ForCausalLM", _starcoder2),
    "falcon": Architecture("FalconForCausalLM", _falcon),
    "olmo2": Architecture("Olmo2ForCausalLM"),
    "glm4": Architecture("Glm4ForCausalLM"),
    "chatglm": Architecture(
        "ChatGLMModel", _chatglm, also=("ChatGLMForConditionalGeneration", "GlmForCausalLM")
    ),
    "qwen": Architecture("QWenLMHeadModel", _qwen),
    "baichuan": Architecture(
        "BaichuanForCausalLM", _baichuan, permuted=True, also=("BaiChuanForCausalLM",)
    ),
    "deepseek": Architecture("DeepseekForCausalLM", _deepseek, permuted=True),
    "gpt-oss": Architecture("GptOssForCausalLM", _gpt_oss, windows=True),
}
