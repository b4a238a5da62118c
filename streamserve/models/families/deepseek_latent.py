"""DeepSeek V2 and V3 and what follows them: latent attention, and routers of their generations.

Kimi K2, Moonlight and R1 are V3; GLM 4.7 Flash is it with other defaults. Layers beyond those of
the config guess further tokens; they are not read.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import UnsupportedModelError
from streamserve.models.families import routed
from streamserve.models.families.family import family
from streamserve.models.families.latent import LatentSizes, latent_decoder, latent_names
from streamserve.models.families.llama import MLP_NAMES, gated_mlp
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec, ExpertsSpec

_SIZES = LatentSizes(rank=512, query_rank=1536, key_size=128, rope_size=64, value_size=128)


def _v2_experts(config: HfConfig) -> ExpertsSpec:
    """By probabilities, without a correction; groups are judged by their best expert."""
    experts = routed.routed_experts(
        config,
        num_experts=config.integer_or(64, "n_routed_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer_or(1407, "moe_intermediate_size"),
        num_shared=config.integer_or(2, "n_shared_experts", minimum=0),
        renormalise=False,
    )
    method = config.values.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedModelError(
            f"{config.source}: topk_method {method!r} is not supported; these are: greedy, "
            "group_limited_greedy"
        )
    router = replace(experts.router, scoring="softmax", correction=False, group_votes=1)
    if method == "greedy":
        router = replace(router, num_groups=1, top_groups=1)
    return replace(experts, router=router)


def _v2(config: HfConfig) -> DecoderSpec:
    if config.flag_or(False, "mlp_bias"):
        raise UnsupportedModelError(f"{config.source}: mlp_bias is not supported")
    spec = latent_decoder(config, gated_mlp(config), _SIZES, interleaved=True, default_context=2048)
    first = config.integer_or(0, "first_k_dense_replace", minimum=0)
    return routed.with_experts(spec, _v2_experts(config), range(first, len(spec.layers)))


def _v3(config: HfConfig) -> DecoderSpec:
    spec = latent_decoder(
        config,
        gated_mlp(config),
        _SIZES,
        interleaved=config.flag_or(True, "rope_interleave"),
        default_context=4096,
    )
    experts = routed.routed_experts(
        config,
        num_experts=config.integer_or(256, "n_routed_experts"),
        top_k=config.integer_or(8, "num_experts_per_tok"),
        intermediate_size=config.integer_or(2048, "moe_intermediate_size"),
        num_shared=config.integer_or(1, "n_shared_experts", minimum=0),
        renormalise=config.flag_or(True, "norm_topk_prob"),
        default_groups=(8, 4),
        default_scale=2.5,
    )
    first = config.integer_or(3, "first_k_dense_replace", minimum=0)
    return routed.with_experts(spec, experts, range(first, len(spec.layers)))


def _glm_flash(config: HfConfig) -> DecoderSpec:
    spec = latent_decoder(
        config,
        gated_mlp(config),
        LatentSizes(rank=512, query_rank=768, key_size=192, rope_size=64, value_size=256),
        interleaved=config.flag_or(True, "rope_interleave"),
        default_context=202_752,
        default_eps=1e-5,
    )
    experts = routed.routed_experts(
        config,
        num_experts=config.integer_or(64, "n_routed_experts"),
        top_k=config.integer_or(4, "num_experts_per_tok"),
        intermediate_size=config.integer_or(1536, "moe_intermediate_size"),
        num_shared=config.integer_or(1, "n_shared_experts", minimum=0),
        renormalise=config.flag_or(True, "norm_topk_prob"),
        default_scale=1.8,
    )
    return routed.with_experts(spec, experts, _sparse_layers(config, len(spec.layers)))


def _sparse_layers(config: HfConfig, num_layers: int) -> range:
    """All but the first, or those that the config lists, which must be the last ones too."""
    kinds = config.values.get("mlp_layer_types")
    if kinds is None:
        return range(config.integer_or(1, "first_k_dense_replace", minimum=0), num_layers)
    first = kinds.index("sparse") if isinstance(kinds, list) and "sparse" in kinds else num_layers
    if kinds != ["dense"] * first + ["sparse"] * (num_layers - first):
        raise UnsupportedModelError(
            f"{config.source}: mlp_layer_types {kinds!r} is not supported: {num_layers} layers, "
            "dense ones before all sparse ones"
        )
    return range(first, num_layers)


def _names(spec: DecoderSpec) -> WeightNames:
    names = latent_names(spec, {**MLP_NAMES, **routed.ROUTED_NAMES})
    return replace(names, skipped=(f"model.layers.{len(spec.layers)}.",))


FAMILIES = (
    family("DeepseekV2ForCausalLM", "deepseek_v2", "DeepSeek", "DeepSeek V2", _v2, 2048, _names),
    family(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        "DeepSeek",
        "DeepSeek V3, R1 (Moonlight, Kimi K2)",
        _v3,
        4096,
        _names,
    ),
    family(
        "Glm4MoeLiteForCausalLM",
        "glm4_moe_lite",
        "GLM",
        "GLM 4.7 Flash",
        _glm_flash,
        202_752,
        _names,
    ),
)
