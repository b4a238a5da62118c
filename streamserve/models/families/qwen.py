"""Qwen 1, as its repositories have it (`modeling_qwen.py`, which is not run here).

Llama's layers under GPT-2's names: one biased product for q, k and v, and a gated MLP of half the
``intermediate_size`` that the config states, in which ``w2`` is the gate. Texts longer than
``seq_length``, which it was trained on, need ``--max-model-len``: rotary frequencies are then
stretched for that length (``use_dynamic_ntk``), and queries past the trained length weigh more
(``use_logn_attn``).
"""

from __future__ import annotations

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import Family
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    QueryScaleSpec,
    RopeScaling,
    RopeSpec,
)

_LAYER = "transformer.h.{layer}."

NAMES = WeightNames(
    {
        "embedding": ("transformer.wte",),
        "final_norm": ("transformer.ln_f",),
        "head": ("lm_head",),
        "layers.attention_norm": (_LAYER + "ln_1",),
        "layers.mlp_norm": (_LAYER + "ln_2",),
        "layers.qkv": (_LAYER + "attn.c_attn",),
        "layers.output": (_LAYER + "attn.c_proj",),
        "layers.gate_up": (_LAYER + "mlp.w2", _LAYER + "mlp.w1"),
        "layers.down": (_LAYER + "mlp.c_proj",),
    },
    ignored=(r"rotary_emb\.inv_freq", r"attn\.masked_bias", r"attn\.logn_tensor"),
)


def _trained(config: HfConfig) -> int:
    return config.integer_or(8192, "seq_length")


def _longest(config: HfConfig) -> int:
    trained = _trained(config)
    if not config.flag_or(False, "use_dynamic_ntk"):
        return trained
    return max(trained, config.integer_or(trained, "max_position_embeddings"))


def _rope(config: HfConfig, head_size: int) -> RopeSpec:
    plain = config.rope(head_size, theta_names=("rotary_emb_base",), partial_names=("rotary_pct",))
    if plain.scaling is not None or not config.flag_or(False, "use_dynamic_ntk"):
        return plain
    scaling = RopeScaling("stepped_dynamic", 1.0, _trained(config))
    return RopeSpec(plain.base, plain.rotary_dim, scaling=scaling)


def _query_scale(config: HfConfig) -> QueryScaleSpec | None:
    if not config.flag_or(False, "use_logn_attn"):
        return None
    return QueryScaleSpec("logarithm", _trained(config))


def _spec(config: HfConfig) -> DecoderSpec:
    if config.values.get("visual"):
        raise UnsupportedModelError(
            f"{config.source}: visual: Qwen-VL's pictures are not supported"
        )
    num_heads = config.integer("num_attention_heads")
    head_size = config.integer_or(128, "kv_channels")
    biased = not config.flag_or(True, "no_bias")
    intermediate_size = config.integer("intermediate_size")
    norm = NormSpec("rms_norm", config.number_or(1e-6, "layer_norm_epsilon"))
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            query_key_head_size=head_size,
            value_head_size=head_size,
            scale=head_size**-0.5,
            rope=_rope(config, head_size),
            qkv_bias=True,
            output_bias=biased,
            query_scale=_query_scale(config),
        ),
        mlp=MlpSpec(intermediate_size // 2, "silu", gated=True, bias=biased),
        attention_norm=norm,
        mlp_norm=norm,
    )
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        layers=(layer,) * config.integer("num_hidden_layers"),
        final_norm=norm,
        tied_head=config.flag_or(False, "tie_word_embeddings"),
    )


FAMILIES = (
    Family(
        architecture="QWenLMHeadModel",
        model_type="qwen",
        series="Qwen",
        title="Qwen 1",
        spec=_spec,
        max_positions=_longest,
        default_positions=_trained,
        names=NAMES,
        end_tokens=("<|im_end|>", "<|im_start|>"),
    ),
)
