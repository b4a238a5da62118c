"""GGUF files of every architecture against transformers, on the weights that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize

from streamserve.cli.bench_floor import step_weight_bytes
from streamserve.models import load_config, load_model
from streamserve.models.gguf.architectures import ARCHITECTURES
from streamserve.models.gguf.kinds import KINDS, unpack_rows
from streamserve.models.gguf.source import GgufQuantization
from streamserve.models.parameters import decoder_modules, final_modules
from streamserve_kernels.stored import concatenate
from tests.models import references
from tests.models.gguf_files import F32, Kind, settings_of, write_gguf
from tests.models.gguf_gemma4 import GEMMA4_CASES
from tests.models.gguf_hybrids import GRANITE_SCALES, HYBRID_CASES
from tests.models.gguf_latent import LATENT_CASES
from tests.models.gguf_mixtures import MIXTURE_CASES
from tests.models.gguf_parity import compare, sizes
from tests.models.native import (
    BAICHUAN_13B,
    BASE,
    CHATGLM,
    DEEPSEEK,
    ENDS,
    FALCON,
    GEMMA,
    GPT2,
    GQA,
    LLAMA3_ROPE,
    LONGROPE,
    MINISTRAL_ROPE,
    NATIVE,
    PHI3,
    QWEN,
    SCALES,
    YARN_ROPE,
)
from tests.models.paged import PagedHarness, Sequence
from tests.models.parity import prompts

CPU = torch.device("cpu")
EPS = {"attention.layer_norm_rms_epsilon": 1e-6}
LAYER_EPS = {"attention.layer_norm_epsilon": 1e-5}
POST_NORMED = {
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.head_count_kv": 2,
    "attention.sliding_window": 6,
    "attention.sliding_window_pattern": [True, False, True],
}
GEMMA_VALUES = {**EPS, "attention.key_length": 16, "attention.value_length": 16}
MOE = {**GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MOE_VALUES = {**EPS, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24}
FALCON_KV = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}


def _llama3_factors() -> dict[str, np.ndarray]:
    """`LlamaModel.generate_extra_tensors`, for heads of eight."""
    frequencies = 500_000.0 ** -(np.arange(0, 8, 2) / 8)
    lengths = 2 * np.pi / frequencies
    smooth = (32 / lengths - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / 8.0 + smooth)
    factors = np.where(lengths < 32 / 4, 1.0, np.where(lengths > 32, 8.0, between))
    return {"rope_freqs.weight": factors.astype(np.float32)}


def _longrope_factors(rope: dict[str, Any] = LONGROPE) -> dict[str, np.ndarray]:
    return {
        f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], dtype=np.float32)
        for kind in ("short", "long")
    }


# Name: (architecture, transformers' config, metadata beside the sizes, more tensors).
CASES: dict[str, tuple[str, Callable[[], Any], dict[str, Any], Callable[[], dict]]] = {
    "llama2": ("llama", lambda: transformers.LlamaConfig(**BASE), EPS, dict),
    "llama3": (
        "llama",
        lambda: transformers.LlamaConfig(
            **GQA, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
        ),
        {**EPS, "attention.head_count_kv": 2, "rope.freq_base": 500_000.0},
        _llama3_factors,
    ),
    "llama-biases": (
        "llama",
        lambda: transformers.LlamaConfig(**GQA, attention_bias=True, mlp_bias=True, head_dim=16),
        {
            **EPS,
            "attention.head_count_kv": 2,
            "attention.key_length": 16,
            "attention.value_length": 16,
        },
        dict,
    ),
    "llama-linear": (
        "llama",
        lambda: transformers.LlamaConfig(
            **GQA, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
        ),
        {
            **EPS,
            "attention.head_count_kv": 2,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 2.0,
        },
        dict,
    ),
    "ministral3": (
        "mistral3",
        lambda: transformers.Ministral3Config(
            **GQA, **ENDS, head_dim=16, rope_parameters=MINISTRAL_ROPE, rms_norm_eps=1e-6
        ),
        {
            **EPS,
            "attention.head_count_kv": 2,
            "attention.key_length": 16,
            "attention.value_length": 16,
            "attention.temperature_scale": 0.4,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_log_multiplier": 1.0,
        },
        dict,
    ),
    "mistral-small": (
        "mistral3",
        lambda: transformers.MistralConfig(**GQA, sliding_window=None),
        {**EPS, "attention.head_count_kv": 2},
        dict,
    ),
    "granite": (
        "granite",
        NATIVE["granite"],
        {**GRANITE_SCALES, "attention.head_count_kv": 2},
        dict,
    ),
    "granite-moe": (
        "granitemoe",
        NATIVE["granite-moe"],
        {
            **GRANITE_SCALES,
            "attention.head_count_kv": 2,
            "expert_count": 4,
            "expert_used_count": 2,
        },
        dict,
    ),
    # A mixture in which all tokens go to one expert besides is a hybrid whose layers all attend.
    "granite-moe-shared": (
        "granitemoe",
        lambda: transformers.GraniteMoeHybridConfig(
            **GQA,
            **SCALES,
            layer_types=["full_attention"] * 3,
            mamba_n_heads=4,
            shared_intermediate_size=40,
            num_local_experts=4,
            num_experts_per_tok=2,
            position_embedding_type="rope",
        ),
        {
            **GRANITE_SCALES,
            "attention.head_count_kv": 2,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_shared_feed_forward_length": 40,
        },
        dict,
    ),
    "bloom": (
        "bloom",
        lambda: transformers.BloomConfig(
            **ENDS,
            vocab_size=97,
            hidden_size=48,
            n_layer=3,
            n_head=6,
            seq_length=128,
            max_position_embeddings=128,
        ),
        LAYER_EPS,
        dict,
    ),
    "mixtral": (
        "llama",
        lambda: transformers.MixtralConfig(**GQA, num_local_experts=4, rms_norm_eps=1e-6),
        {
            **EPS,
            "attention.head_count_kv": 2,
            "rope.freq_base": 1e6,
            "expert_count": 4,
            "expert_used_count": 2,
        },
        dict,
    ),
    "qwen2": (
        "qwen2",
        lambda: transformers.Qwen2Config(**GQA, tie_word_embeddings=True),
        {**EPS, "attention.head_count_kv": 2},
        dict,
    ),
    "qwen2.5-yarn": (
        "qwen2",
        lambda: transformers.Qwen2Config(**GQA, rope_parameters=YARN_ROPE),
        {
            **EPS,
            "attention.head_count_kv": 2,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
        dict,
    ),
    "qwen3": (
        "qwen3",
        lambda: transformers.Qwen3Config(**GQA, head_dim=16),
        {**GEMMA_VALUES, "attention.head_count_kv": 2},
        dict,
    ),
    "qwen2moe": (
        "qwen2moe",
        lambda: transformers.Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=40),
        {**MOE_VALUES, "attention.head_count_kv": 2, "expert_shared_feed_forward_length": 40},
        dict,
    ),
    "qwen3moe": (
        "qwen3moe",
        lambda: transformers.Qwen3MoeConfig(**MOE, head_dim=16, norm_topk_prob=True),
        {**MOE_VALUES, **GEMMA_VALUES, "attention.head_count_kv": 2},
        dict,
    ),
    "smollm3": (
        "smollm3",
        lambda: transformers.SmolLM3Config(**{**GQA, "num_hidden_layers": 4}, **ENDS),
        {**EPS, "attention.head_count_kv": 2, "rope.freq_base": 2_000_000.0},
        dict,
    ),
    "gemma": (
        "gemma",
        lambda: transformers.GemmaConfig(**GQA, **ENDS, head_dim=16),
        {**GEMMA_VALUES, "attention.head_count_kv": 2},
        dict,
    ),
    "gemma2": (
        "gemma2",
        lambda: transformers.Gemma2Config(
            **{**GEMMA, "query_pre_attn_scalar": 16},
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
            attn_implementation="eager",
        ),
        {
            **GEMMA_VALUES,
            "attention.head_count_kv": 2,
            "attention.sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
        dict,
    ),
    "gemma3": (
        "gemma3",
        lambda: transformers.Gemma3TextConfig(
            **{**GEMMA, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
            layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        ),
        {
            **GEMMA_VALUES,
            "attention.head_count_kv": 2,
            "attention.sliding_window": 6,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        dict,
    ),
    "phi2": (
        "phi2",
        lambda: transformers.PhiConfig(**BASE),
        {**LAYER_EPS, "attention.head_count_kv": 4, "rope.dimension_count": 4},
        dict,
    ),
    "phi3": (
        "phi3",
        lambda: transformers.Phi3Config(**PHI3, sliding_window=7),
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.head_count_kv": 1,
            "attention.sliding_window": 7,
            "rope.dimension_count": 16,
        },
        dict,
    ),
    "phi3-long": (
        "phi3",
        lambda: transformers.Phi3Config(
            **PHI3, rope_parameters=LONGROPE, original_max_position_embeddings=32
        ),
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.head_count_kv": 1,
            "attention.sliding_window": 0,
            "rope.dimension_count": 16,
            "rope.scaling.original_context_length": 32,
            # As `Phi3MiniModel` computes it, for four times the trained length.
            "rope.scaling.attn_factor": float(np.sqrt(1 + np.log(4) / np.log(32))),
        },
        _longrope_factors,
    ),
    "gpt2": ("gpt2", lambda: transformers.GPT2Config(**GPT2, **ENDS), LAYER_EPS, dict),
    "gptneox": (
        "gptneox",
        lambda: transformers.GPTNeoXConfig(**BASE),
        {**LAYER_EPS, "rope.dimension_count": 2, "use_parallel_residual": True},
        dict,
    ),
    "starcoder2": (
        "starcoder2",
        lambda: transformers.Starcoder2Config(**GQA, **ENDS, sliding_window=None),
        {**LAYER_EPS, "attention.head_count_kv": 2},
        dict,
    ),
    "falcon-7b": (
        "falcon",
        lambda: transformers.FalconConfig(**FALCON),
        {**LAYER_EPS, "attention.head_count_kv": 1},
        dict,
    ),
    "falcon-40b": (
        "falcon",
        lambda: transformers.FalconConfig(**FALCON_KV, tie_word_embeddings=False),
        {**LAYER_EPS, "attention.head_count_kv": 2},
        dict,
    ),
    "olmo2": (
        "olmo2",
        lambda: transformers.Olmo2Config(**GQA, **ENDS),
        {"attention.layer_norm_rms_epsilon": 1e-5, "attention.head_count_kv": 2},
        dict,
    ),
    "glm4": (
        "glm4",
        lambda: transformers.Glm4Config(**GQA, **ENDS, head_dim=16, attention_bias=True),
        {
            "attention.layer_norm_rms_epsilon": 1.5625e-7,
            "attention.head_count_kv": 2,
            "attention.key_length": 16,
            "attention.value_length": 16,
            "rope.dimension_count": 8,
        },
        dict,
    ),
    "olmo": ("olmo", NATIVE["olmo"], {**LAYER_EPS, "attention.head_count_kv": 2}, dict),
    "olmo-1.7": (
        "olmo",
        NATIVE["olmo-1.7"],
        {**LAYER_EPS, "attention.head_count_kv": 2, "attention.clamp_kqv": 0.5},
        dict,
    ),
    "olmo3": (
        "olmo2",
        NATIVE["olmo3"],
        {
            **POST_NORMED,
            "rope.freq_base": 5e5,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
        dict,
    ),
    "exaone4": (
        "exaone4",
        NATIVE["exaone4"],
        {**POST_NORMED, "rope.freq_base": 5e5},
        _llama3_factors,
    ),
    "exaone4-small": (
        "exaone4",
        NATIVE["exaone4-small"],
        {"attention.layer_norm_rms_epsilon": 1e-5, "attention.head_count_kv": 2},
        dict,
    ),
    "seed-oss": (
        "seed_oss",
        NATIVE["seed-oss"],
        {**GEMMA_VALUES, "attention.head_count_kv": 2},
        dict,
    ),
    "hunyuan-dense": (
        "hunyuan-dense",
        NATIVE["hunyuan-dense"],
        {
            **GEMMA_VALUES,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.head_count_kv": 2,
            "rope.freq_base": 10_000.0 * 1000.0 ** (16 / 14),
            "rope.scaling.type": "none",
            "rope.scaling.factor": 1.0,
            "rope.scaling.original_context_length": 262_144,
        },
        dict,
    ),
    "arcee": (
        "arcee",
        NATIVE["arcee"],
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.head_count_kv": 2,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
        dict,
    ),
    "stablelm": (
        "stablelm",
        NATIVE["stablelm"],
        {
            **LAYER_EPS,
            "attention.head_count_kv": 2,
            "rope.dimension_count": 2,
            "use_parallel_residual": True,  # which counts for nothing
        },
        dict,
    ),
    "nemotron": (
        "nemotron",
        NATIVE["nemotron"],
        {**LAYER_EPS, "attention.head_count_kv": 2, "rope.dimension_count": 4},
        dict,
    ),
    "starcoder": (
        "starcoder",
        NATIVE["gpt-bigcode"],
        {**LAYER_EPS, "attention.head_count_kv": 1},
        dict,
    ),
    "command-r-plus": (
        "command-r",
        NATIVE["command-r-plus"],
        {
            **LAYER_EPS,
            "attention.head_count_kv": 2,
            "logit_scale": 0.0625,
            "rope.freq_base": 500_000.0,
        },
        dict,
    ),
    "stablelm-12b": (
        "stablelm",
        NATIVE["stablelm-12b"],
        {**LAYER_EPS, "attention.head_count_kv": 2, "rope.dimension_count": 2},
        dict,
    ),
    "cohere": (
        "command-r",
        lambda: transformers.CohereConfig(**GQA, **ENDS, logit_scale=0.3),
        {
            **LAYER_EPS,
            "attention.head_count_kv": 2,
            "logit_scale": 0.3,
            "rope.freq_base": 500_000.0,
            "rope.scaling.type": "none",
        },
        dict,
    ),
    "cohere2": (
        "cohere2",
        lambda: transformers.Cohere2Config(
            **{**GQA, "num_hidden_layers": 4}, **ENDS, sliding_window=6
        ),
        {
            **LAYER_EPS,
            "attention.head_count_kv": 2,
            "attention.sliding_window": 6,
            "logit_scale": 0.0625,
            "rope.dimension_count": 8,
            "rope.scaling.type": "none",
        },
        dict,
    ),
    "chatglm": (
        "chatglm",
        lambda: references.ChatGlm(**CHATGLM, rope_ratio=50),
        {
            "attention.layer_norm_rms_epsilon": CHATGLM["layernorm_epsilon"],
            "attention.head_count_kv": CHATGLM["multi_query_group_num"],
            "attention.key_length": CHATGLM["kv_channels"],
            "attention.value_length": CHATGLM["kv_channels"],
            "rope.dimension_count": CHATGLM["kv_channels"] // 2,
            "rope.freq_base": 500_000.0,
        },
        dict,
    ),
    "glm": (
        "chatglm",
        lambda: transformers.GlmConfig(**GQA, **ENDS, head_dim=8),
        {
            "attention.layer_norm_rms_epsilon": 1.5625e-7,
            "attention.head_count_kv": 2,
            "rope.dimension_count": 4,
        },
        dict,
    ),
    "qwen": (
        "qwen",
        lambda: references.Qwen(**QWEN),
        {"attention.layer_norm_epsilon": 1e-6, "rope.freq_base": 10_000.0},
        dict,
    ),
    "baichuan": (
        "baichuan",
        lambda: references.Baichuan("BaiChuanForCausalLM", **BASE),
        EPS,
        dict,
    ),
    "baichuan-13b": (
        "baichuan",
        lambda: references.Baichuan(**{**BAICHUAN_13B, "num_hidden_layers": 40}),
        EPS,
        dict,
    ),
    "deepseek": (
        "deepseek",
        lambda: references.Deepseek(**DEEPSEEK),
        {
            **EPS,
            "attention.head_count_kv": 2,
            "expert_count": 5,
            "expert_used_count": 3,
            "expert_shared_count": 2,
            "expert_feed_forward_length": 24,
            "expert_weights_scale": 1.0,
            "leading_dense_block_count": 1,
        },
        dict,
    ),
    "gpt-oss": (
        "gpt-oss",
        NATIVE["gpt-oss"],
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.head_count_kv": 2,
            "attention.key_length": 16,
            "attention.value_length": 16,
            "attention.sliding_window": 6,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 48,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
        },
        dict,
    ),
    **GEMMA4_CASES,
    **HYBRID_CASES,
    **MIXTURE_CASES,
    **LATENT_CASES,
}


def test_every_architecture_has_a_case():
    assert {architecture for architecture, *_ in CASES.values()} == set(ARCHITECTURES)


def _write(path: Path, case: str, build: Any, **options: Any) -> Any:
    """Writes the case's file; returns the model that it stands for."""
    architecture, config, values, extra = CASES[case]
    model = build(config())
    values = {**sizes(settings_of(model)), **values}
    write_gguf(path, model, architecture, values, extra=extra(), **options)
    return model


@pytest.mark.parametrize("case", CASES)
def test_plain_weights_are_those_of_transformers(case, tmp_path, build, kernels):
    model = _write(tmp_path / "model.gguf", case, build)
    config = load_config(tmp_path / "model.gguf")
    assert config.stored_quantization is None
    assert config.spec.vocab_size == 97
    # transformers takes the long factors for texts of more than 32 tokens: each must be one.
    compare(tmp_path / "model.gguf", model, kernels, num_greedy=32 if case == "phi3-long" else 8)


def test_within_the_trained_length_the_short_factors_count(tmp_path, build, kernels):
    rope = {**LONGROPE, "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0]}
    config = transformers.Phi3Config(
        **PHI3, rope_parameters=rope, original_max_position_embeddings=32
    )
    model = build(config)
    values = {**sizes(config), **CASES["phi3-long"][2]}
    write_gguf(tmp_path / "m.gguf", model, "phi3", values, extra=_longrope_factors(rope))
    tokens = prompts(shared=10)[0][:20]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    for length, are_equal in ((32, True), (33, False)):  # one more: the long ones, for all
        decoder = load_model(
            tmp_path / "m.gguf",
            dtype=torch.float32,
            device=CPU,
            kernels=kernels,
            max_model_len=length,
        )
        ours = PagedHarness(decoder).prefill([Sequence(tokens)], None)[0]
        assert ours.allclose(expected, rtol=1e-4, atol=1e-4) == are_equal


# Rows of 32 and 64: whole blocks of the older kinds, in all that is a matrix.
WIDE = {"intermediate_size": 64}


def test_a_step_reads_as_much_with_a_tied_head_as_without(tmp_path, build):
    """And no table that only rows are taken of, packed or plain."""
    found = []
    for name, tied in (("tied", True), ("untied", False)):
        config = transformers.LlamaConfig(**{**GQA, **WIDE}, tie_word_embeddings=tied)
        values = {**sizes(config), **EPS, "attention.head_count_kv": 2}
        file = tmp_path / f"{name}.gguf"
        write_gguf(file, build(config), "llama", values, kind=lambda name: Kind.Q8_0)
        packed = load_config(file)
        plain = replace(packed, stored_quantization=None)
        found.append([step_weight_bytes(c, torch.bfloat16, None, 1) for c in (packed, plain)])
        assert found[-1][0] < found[-1][1]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0], ids=str)
def test_packed_weights_stay_packed(kind, tmp_path, build, kernels):
    config = transformers.LlamaConfig(**{**GQA, **WIDE})
    model = build(config)
    values = {**sizes(config), **EPS, "attention.head_count_kv": 2}
    write_gguf(tmp_path / "m.gguf", model, "llama", values, kind=lambda name: kind)
    decoder = compare(tmp_path / "m.gguf", model, kernels)
    stored = load_config(tmp_path / "m.gguf").stored_quantization
    assert stored is not None
    assert stored.name == "gguf"
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    # Norms are plain; outputs are padded to whole tiles.
    assert decoder.nbytes < 1.8 * matrices * nbytes / block
    assert decoder.nbytes <= load_config(tmp_path / "m.gguf").weight_bytes(torch.float32)


def test_a_head_that_is_normalised_is_not_kept_packed(tmp_path, build):
    config = transformers.LlamaConfig(**{**GQA, **WIDE})
    values = {**sizes(config), **EPS, "attention.head_count_kv": 2}
    write_gguf(tmp_path / "m.gguf", build(config), "llama", values, kind=lambda name: Kind.Q8_0)
    spec = load_config(tmp_path / "m.gguf").spec
    stored = load_config(tmp_path / "m.gguf").stored_quantization
    [*_, head] = final_modules(spec)
    for normalised in (False, True):
        asked = replace(spec, normalised_head=normalised)
        held = GgufQuantization.of(stored.tensors, stored.names, asked)
        assert (held.kinds(head) is None) is normalised


@pytest.mark.parametrize(
    "case",
    [
        "mixtral",
        "qwen2moe",
        "qwen2",
        "falcon-40b",
        "phi3",
        "gpt-oss",
        "baichuan",
        "qwen3.5",
        "qwen3-next",
        "lfm2",
        "glm4-moe",
    ],
)
def test_experts_and_fused_matrices_are_packed_too(case, tmp_path, build, kernels):
    # Rows of 3, 24, 40 or 48: no whole blocks.
    narrow = ("down_exps", "down_shexp", "ffn_down", "ssm_out", "conv.", "conv1d")
    model = _write(
        tmp_path / "m.gguf",
        case,
        build,
        kind=lambda name: F32 if any(part in name for part in narrow) else Kind.Q8_0,
    )
    compare(tmp_path / "m.gguf", model, kernels)


MIXES = {
    "q4_k_m": {"attn_v": Kind.Q6_K, "ffn_down": Kind.Q6_K, "token_embd": Kind.Q6_K, "": Kind.Q4_K},
    "q2_k": {"attn_v": Kind.Q3_K, "ffn_gate": Kind.Q3_K, "output": Kind.Q6_K, "": Kind.Q2_K},
    "tables": {"attn_v": Kind.IQ4_NL, "ffn_down": Kind.MXFP4, "attn_k": Kind.Q4_0, "": Kind.IQ4_XS},
    "q5_k": {"attn_q": Kind.Q8_0, "attn_v": Kind.BF16, "ffn_up": Kind.Q5_0, "": Kind.Q5_K},
}


@pytest.mark.parametrize("mix", MIXES)
def test_parts_of_unlike_kinds_make_one_matrix(mix, tmp_path, build, kernels):
    config = transformers.LlamaConfig(
        **{**GQA, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    )
    model = build(config)
    for norm in (p for p in model.parameters() if p.dim() == 1):
        norm.data.mul_(0.3)  # or logits of this width are too large to compare
    values = {**sizes(config), **EPS, "attention.head_count_kv": 2}
    kinds = MIXES[mix]
    write_gguf(
        tmp_path / "m.gguf",
        model,
        "llama",
        values,
        kind=lambda name: next(kind for part, kind in kinds.items() if part in name),
    )
    decoder = compare(tmp_path / "m.gguf", model, kernels, tolerance=1e-3)
    loaded = load_config(tmp_path / "m.gguf")
    assert decoder.nbytes <= loaded.weight_bytes(torch.float32)
    for module in decoder_modules(loaded.spec):
        for kind in loaded.stored_quantization.kinds(module) or ():
            planned = loaded.stored_quantization.format(module)
            assert planned.bits >= kind.bits
            assert planned.group <= kind.group


@pytest.mark.parametrize("number", [n for n, kind in KINDS.items() if kind.unpack is not None])
def test_any_block_is_dequantised_as_by_ggml(number):
    kind = KINDS[number]
    assert (kind.block, kind.nbytes) == gguf.GGML_QUANT_SIZES[Kind(number)]
    assert kind.name == Kind(number).name
    data = np.random.default_rng(number).integers(0, 256, (7, 3 * kind.nbytes), dtype=np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = torch.from_numpy(dequantize(data, Kind(number)))
    ours = unpack_rows(kind, torch.from_numpy(data), 7).dequantise()
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def test_stacking_unlike_kinds_changes_no_bit():
    generator = np.random.default_rng(1)
    parts = []
    for kind in KINDS.values():
        if kind.unpack is None:
            continue
        shape = (3, 512 // kind.block * kind.nbytes)
        data = generator.integers(0, 256, shape, dtype=np.uint8)
        # The high byte of no float16 may be that of an infinity.
        parts.append(unpack_rows(kind, torch.from_numpy(data & 0xBB), 3))
    for first in parts:
        for second in parts:
            expected = torch.cat((first.dequantise(), second.dequantise()))
            torch.testing.assert_close(
                concatenate([first, second]).dequantise(), expected, rtol=0, atol=0, equal_nan=True
            )
