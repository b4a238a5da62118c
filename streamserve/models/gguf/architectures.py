"""The architectures of GGUF files that are served, by llama.cpp's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from streamserve.models.gguf.architecture import (
    Architecture,
    Values,
    every,
    has_bias,
    layer_types,
    turning_share,
)
from streamserve.models.gguf.gemma4 import GEMMA4
from streamserve.models.gguf.granite import GRANITE
from streamserve.models.gguf.hybrids import HYBRIDS
from streamserve.models.gguf.latent import LATENT
from streamserve.models.gguf.mixtures import MIXTURES
from streamserve.models.gguf.rope_scaling import rope_scaling

if TYPE_CHECKING:
    from streamserve.models.gguf.reading import Reading


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


def _mistral3(reading: Reading) -> Values:
    """Mistral Small's are files of this architecture, too."""
    beta = reading.number_or(0.0, "attention.temperature_scale")
    magnitude = reading.number_or(0.0, "rope.scaling.yarn_log_multiplier")
    scaling = rope_scaling(reading)
    if scaling is not None and magnitude:
        scaling = {**scaling, "mscale": 1.0, "mscale_all_dim": magnitude}
    if beta:
        scaling = {**(scaling or {}), "llama_4_scaling_beta": beta}
        return {"architectures": ["Ministral3ForCausalLM"], "rope_scaling": scaling}
    return {**_llama(reading), "rope_scaling": scaling}


def _gemma_scale(reading: Reading, layers_of_27b: int) -> int:
    """The largest of each generation counts a head as its share of the hidden size."""
    if reading.integer("block_count") == layers_of_27b:
        return reading.integer("embedding_length") // reading.integer("attention.head_count")
    return reading.head_size


def _gemma2(reading: Reading) -> Values:
    return {
        "sliding_window": reading.integer_or(4096, "attention.sliding_window"),
        "layer_types": layer_types(reading),
        "attn_logit_softcapping": reading.number_or(50.0, "attn_logit_softcapping"),
        "final_logit_softcapping": reading.number_or(30.0, "final_logit_softcapping"),
        "query_pre_attn_scalar": _gemma_scale(reading, 46),
    }


def _gemma3(reading: Reading) -> Values:
    scaling = rope_scaling(reading) or {"rope_type": "default"}
    everywhere = {**scaling, "rope_theta": reading.number_or(1e6, "rope.freq_base")}
    nearby = {"rope_type": "default", "rope_theta": reading.number_or(1e4, "rope.freq_base_swa")}
    window = reading.integer_or(0, "attention.sliding_window")
    layers = reading.integer("block_count")
    return {
        "sliding_window": window or None,
        "sliding_window_pattern": every(reading),
        "layer_types": layer_types(reading) if window else ["full_attention"] * layers,
        "final_logit_softcapping": reading.optional_number("final_logit_softcapping") or None,
        "query_pre_attn_scalar": _gemma_scale(reading, 62),
        "rope_scaling": {"full_attention": everywhere, "sliding_attention": nearby},
    }


def _cohere(reading: Reading) -> Values:
    return {
        "logit_scale": reading.number_or(1.0, "logit_scale"),
        "use_qk_norm": reading.has_tensor("blk.0.attn_q_norm.weight"),
    }


def _cohere2(reading: Reading) -> Values:
    return {
        "logit_scale": reading.number_or(1.0, "logit_scale"),
        "sliding_window": reading.integer("attention.sliding_window"),
        "sliding_window_pattern": every(reading),
        "layer_types": layer_types(reading),
    }


def _olmo2(reading: Reading) -> Values:
    """The third generation, with windows, is a file of this architecture too."""
    window = reading.integer_or(0, "attention.sliding_window")
    if not window:
        return {}
    base = reading.number_or(10_000.0, "rope.freq_base")
    scaling = rope_scaling(reading) or {"rope_type": "default"}
    nearby = reading.number_or(base, "rope.freq_base_swa")
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "sliding_window": window,
        "layer_types": layer_types(reading),
        "rope_scaling": {
            "full_attention": {**scaling, "rope_theta": base},
            "sliding_attention": {"rope_type": "default", "rope_theta": nearby},
        },
    }


_EXAONE_32B = 64


def _exaone4(reading: Reading) -> Values:
    """The 32B, which llama.cpp tells by its layers, has windows even where none is written."""
    implied = 4096 if reading.integer("block_count") == _EXAONE_32B else 0
    return {
        "sliding_window": reading.integer_or(implied, "attention.sliding_window") or None,
        "sliding_window_pattern": every(reading),
        "layer_types": layer_types(reading),
    }


def _stablelm(reading: Reading) -> Values:
    return {
        "use_qkv_bias": has_bias(reading, "attn_q"),
        "qk_layernorm": reading.has_tensor("blk.0.attn_q_norm.weight"),
        # What the file says of this is not to be relied on.
        "use_parallel_residual": not reading.has_tensor("blk.0.ffn_norm.weight"),
        "partial_rotary_factor": turning_share(reading),
    }


def _nemotron(reading: Reading) -> Values:
    return {
        "norm_eps": reading.optional_number("attention.layer_norm_epsilon"),
        "partial_rotary_factor": turning_share(reading),
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


def _bloom(reading: Reading) -> Values:
    return {"seq_length": reading.integer("context_length")}


def _gptneox(reading: Reading) -> Values:
    stated = reading.file.metadata.optional_flag(reading.key("use_parallel_residual"))
    return {"use_parallel_residual": stated is not False}


def _phi2(reading: Reading) -> Values:
    return {"qk_layernorm": reading.has_tensor("blk.0.attn_q_norm.weight")}


def _starcoder2(reading: Reading) -> Values:
    return {"use_bias": has_bias(reading, "ffn_up"), "hidden_act": "gelu_pytorch_tanh"}


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
    bias = has_bias(reading, "attn_qkv") or has_bias(reading, "attn_q")
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


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM",
        _llama,
        permuted=True,
        windows=True,
        also=("MistralForCausalLM", "MixtralForCausalLM"),
    ),
    "mistral3": Architecture(
        "LlamaForCausalLM",
        _mistral3,
        permuted=True,
        also=("Ministral3ForCausalLM", "MixtralForCausalLM"),
        read=("attention.temperature_scale", "rope.scaling.yarn_log_multiplier"),
    ),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "smollm3": Architecture("SmolLM3ForCausalLM", permuted=True),
    "gemma": Architecture("GemmaForCausalLM", norm_offset=1.0),
    "gemma2": Architecture("Gemma2ForCausalLM", _gemma2, norm_offset=1.0, windows=True),
    "gemma3": Architecture("Gemma3ForCausalLM", _gemma3, norm_offset=1.0, windows=True),
    "phi2": Architecture("PhiForCausalLM", _phi2),
    "phi3": Architecture("Phi3ForCausalLM", _phi3, windows=True),
    "gpt2": Architecture("GPT2LMHeadModel"),
    "bloom": Architecture("BloomForCausalLM", _bloom),
    "gptneox": Architecture("GPTNeoXForCausalLM", _gptneox),
    "starcoder2": Architecture("Starcoder2ForCausalLM", _starcoder2),
    "falcon": Architecture("FalconForCausalLM", _falcon),
    "starcoder": Architecture("GPTBigCodeForCausalLM"),
    "olmo": Architecture(
        "OlmoForCausalLM",
        lambda reading: {"clip_qkv": reading.optional_number("attention.clamp_kqv") or None},
        permuted=True,
        read=("attention.clamp_kqv",),
    ),
    "olmo2": Architecture("Olmo2ForCausalLM", _olmo2, windows=True, also=("Olmo3ForCausalLM",)),
    "exaone4": Architecture("Exaone4ForCausalLM", _exaone4, windows=True),
    "seed_oss": Architecture(
        "SeedOssForCausalLM",
        lambda reading: {"attention_out_bias": has_bias(reading, "attn_output")},
    ),
    "hunyuan-dense": Architecture("HunYuanDenseV1ForCausalLM"),
    "arcee": Architecture("ArceeForCausalLM", permuted=True),
    "stablelm": Architecture("StableLmForCausalLM", _stablelm),
    "nemotron": Architecture("NemotronForCausalLM", _nemotron, norm_offset=1.0),
    "glm4": Architecture("Glm4ForCausalLM"),
    "chatglm": Architecture(
        "ChatGLMModel", _chatglm, also=("ChatGLMForConditionalGeneration", "GlmForCausalLM")
    ),
    "command-r": Architecture("CohereForCausalLM", _cohere, read=("logit_scale",)),
    "cohere2": Architecture("Cohere2ForCausalLM", _cohere2, windows=True, read=("logit_scale",)),
    "qwen": Architecture("QWenLMHeadModel", _qwen),
    "baichuan": Architecture(
        "BaichuanForCausalLM", _baichuan, permuted=True, also=("BaiChuanForCausalLM",)
    ),
    **GEMMA4,
    **MIXTURES,
    **GRANITE,
    **HYBRIDS,
    **LATENT,
}
