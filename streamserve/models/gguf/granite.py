"""GGUF files of Granite, its mixtures and its hybrids, in the words of our families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from streamserve.models.gguf.architecture import Architecture, Values
from streamserve.models.gguf.hybrids import some_kv_heads, state_space

if TYPE_CHECKING:
    from streamserve.models.gguf.reading import Reading

_SCALES = ("attention.scale", "embedding_scale", "logit_scale", "residual_scale")


def _scales(reading: Reading) -> Values:
    """What a file leaves out, or has as 0, changes nothing."""
    return {
        "attention_multiplier": reading.number_or(0.0, "attention.scale")
        or reading.head_size**-0.5,
        "embedding_multiplier": reading.number_or(0.0, "embedding_scale") or 1.0,
        "logits_scaling": reading.number_or(0.0, "logit_scale") or 1.0,
        "residual_multiplier": reading.number_or(0.0, "residual_scale") or 1.0,
    }


def _experts(reading: Reading) -> Values:
    return {
        "num_local_experts": reading.integer_or(0, "expert_count"),
        "num_experts_per_tok": reading.integer_or(0, "expert_used_count") or None,
    }


def _turns(reading: Reading) -> bool:
    """Whether positions are rotated, which the key does not sound like."""
    stated = reading.file.metadata.optional_flag(reading.key("rope.scaling.finetuned"))
    return stated is not False


def _granite(reading: Reading) -> Values:
    """A hybrid whose layers all attend is a file of this architecture, too."""
    values = {**_scales(reading), **_experts(reading)}
    shared = reading.integer_or(0, "expert_shared_feed_forward_length")
    if not _turns(reading) or (values["num_local_experts"] and shared):
        return {**_hybrid(reading), "layer_types": ["attention"] * reading.num_layers}
    if values["num_local_experts"]:
        return {**values, "architectures": ["GraniteMoeForCausalLM"]}
    return {**values, "architectures": ["GraniteForCausalLM"]}


def _hybrid(reading: Reading) -> Values:
    values = _experts(reading)
    inner = "expert_shared_feed_forward_length" if values["num_local_experts"] else None
    return {
        **_scales(reading),
        **values,
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "shared_intermediate_size": reading.integer(inner or "feed_forward_length"),
        "position_embedding_type": "rope" if _turns(reading) else "nope",
    }


def _granite_hybrid(reading: Reading) -> Values:
    heads = reading.file.metadata.numbers(reading.key("attention.head_count_kv"))
    layers = range(reading.num_layers)
    return {
        **_hybrid(reading),
        **state_space(reading),
        "layer_types": ["attention" if count else "mamba" for count in heads],
        "mamba_expand": reading.integer("ssm.inner_size") // reading.integer("embedding_length"),
        "attention_bias": any(reading.has_tensor(f"blk.{n}.attn_q.bias") for n in layers),
    }


_GRANITE = Architecture(
    "GraniteForCausalLM",
    _granite,
    permuted=True,
    also=("GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM"),
    read=_SCALES,
)
GRANITE: Mapping[str, Architecture] = {
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitehybrid": Architecture(
        "GraniteMoeHybridForCausalLM",
        _granite_hybrid,
        permuted=True,
        num_kv_heads=some_kv_heads,
        read=_SCALES,
    ),
}
