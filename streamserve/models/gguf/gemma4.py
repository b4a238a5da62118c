"""GGUF files of Gemma 4, in the words of our family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streamserve.errors import UnsupportedModelError
from streamserve.models.gguf.architecture import Architecture, Values, layer_types

if TYPE_CHECKING:
    from streamserve.models.gguf.reading import Reading

_SLIDING, _FULL = "sliding_attention", "full_attention"
_STILL = 1e29  # a frequency divided by so much turns no pair in any context


def _by_layer(reading: Reading, key: str) -> list[int]:
    metadata, named = reading.file.metadata, reading.key(key)
    if metadata.is_array(named):
        return metadata.numbers(named)
    return [reading.integer(key)] * reading.num_layers


def _kinds(reading: Reading) -> list[str]:
    return layer_types(reading) or [_FULL] * reading.num_layers


def _of_kind(reading: Reading, values: Sequence[Any], kind: str) -> Any:
    """That of the layers of a kind; None without any."""
    found = {value for value, of in zip(values, _kinds(reading), strict=True) if of == kind}
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{reading.file.path}: {kind} layers with {sorted(found)} key and value heads are not "
            "supported: they must have as many each"
        )
    return next(iter(found), None)


def _num_kv_heads(reading: Reading) -> int | None:
    heads = _by_layer(reading, "attention.head_count_kv")
    of_sliding = _of_kind(reading, heads, _SLIDING)
    return heads[0] if of_sliding is None else of_sliding


def _intermediate_size(reading: Reading) -> int:
    return _by_layer(reading, "feed_forward_length")[0]


def _is_double(reading: Reading, num_sharing: int) -> bool:
    """Whether the layers without keys and values of their own are twice as wide."""
    widths = _by_layer(reading, "feed_forward_length")
    first, num_own = widths[0], len(widths) - num_sharing
    if widths == [first] * len(widths):
        return False
    if widths != [first] * num_own + [2 * first] * num_sharing:
        raise UnsupportedModelError(
            f"{reading.file.path}: {reading.key('feed_forward_length')} {widths} is not supported: "
            f"it must be the same, or twice that in the last {num_sharing} layers"
        )
    return True


def _turning_share(reading: Reading) -> float:
    """Of the pairs of a head in full attention: the first ones, whose frequencies are as they are.

    The others' are divided by so much that they stand still.
    """
    if not reading.has_tensor("rope_freqs.weight"):
        return 1.0
    factors = reading.floats("rope_freqs.weight")
    turning = sum(1 for factor in factors if factor == 1.0)
    rest = factors[turning:]
    if factors[:turning] != [1.0] * turning or any(factor < _STILL for factor in rest):
        raise UnsupportedModelError(
            f"{reading.file.path}: rope_freqs.weight must be ones, then numbers of at least "
            f"{_STILL:g}"
        )
    return turning / len(factors)


def _gemma4(reading: Reading) -> Values:
    kinds, num_sharing = _kinds(reading), reading.integer_or(0, "attention.shared_kv_layers")
    heads = _by_layer(reading, "attention.head_count_kv")
    head_size = reading.head_size
    full = {
        "head_dim": head_size,
        "num_key_value_heads": _of_kind(reading, heads, _FULL),
    }
    num_own = reading.num_layers - num_sharing
    of_full = [layer for layer in range(num_own) if kinds[layer] == _FULL]
    num_experts = reading.integer_or(0, "expert_count")
    mixture = {
        "enable_moe_block": True,
        "num_experts": num_experts,
        "top_k_experts": reading.optional_integer("expert_used_count"),
        "moe_intermediate_size": reading.optional_integer("expert_feed_forward_length"),
    }
    return {
        "head_dim": reading.integer_or(head_size, "attention.key_length_swa"),
        "per_layer_config": {str(n): full for n, kind in enumerate(kinds) if kind == _FULL},
        "layer_types": kinds,
        "sliding_window": reading.optional_integer("attention.sliding_window"),
        "attention_k_eq_v": not any(_has_values(reading, layer) for layer in of_full),
        "num_kv_shared_layers": num_sharing,
        "use_double_wide_mlp": _is_double(reading, num_sharing),
        "hidden_size_per_layer_input": reading.integer_or(0, "embedding_length_per_layer_input"),
        "final_logit_softcapping": reading.optional_number("final_logit_softcapping") or None,
        "rope_parameters": {
            _FULL: {
                "rope_type": "proportional",
                "rope_theta": reading.number_or(1e6, "rope.freq_base"),
                "partial_rotary_factor": _turning_share(reading),
            },
            _SLIDING: {
                "rope_type": "default",
                "rope_theta": reading.number_or(1e4, "rope.freq_base_swa"),
            },
        },
        **(mixture if num_experts else {}),
    }


def _has_values(reading: Reading, layer: int) -> bool:
    return any(reading.has_tensor(f"blk.{layer}.attn_{name}.weight") for name in ("v", "qkv"))


GEMMA4 = {
    "gemma4": Architecture(
        "Gemma4ForCausalLM",
        _gemma4,
        windows=True,
        num_kv_heads=_num_kv_heads,
        intermediate_size=_intermediate_size,
        read=("attention.shared_kv_layers",),
    ),
}
