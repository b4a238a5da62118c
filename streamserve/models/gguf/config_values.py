"""What a GGUF file holds, in the words of our families.

A file's architecture is llama.cpp's name for it, and its values have llama.cpp's names. They become
the values of a ``config.json`` of transformers, so that a family's own reading makes the spec.
What the converter did to the weights is undone when they are read (`tensors`): then a spec is the
same from either kind of checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streamserve.errors import UnsupportedModelError
from streamserve.models.gguf.architecture import Architecture, Values, has_bias, rotary_factor
from streamserve.models.gguf.architectures import ARCHITECTURES
from streamserve.models.gguf.rope_scaling import rope_scaling

if TYPE_CHECKING:
    from streamserve.models.gguf.reading import Reading

# What would change an answer and is not built, by the value that changes nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0, 0.0),
    "attention.max_alibi_bias": (0, 0.0),
    "attention.scale": (),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
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
    common = _common(reading, architecture)
    known = {name: value for name, value in common.items() if value is not None}
    values = {**known, **architecture.values(reading)}  # whose None may switch something off
    [named] = values.setdefault("architectures", [architecture.family])
    assert named in (architecture.family, *architecture.also)
    return values


def _common(reading: Reading, architecture: Architecture) -> Values:
    """What every family has, by all of the names that one or the other looks for."""
    head_size = architecture.head_size(reading)
    layer_eps = reading.optional_number("attention.layer_norm_epsilon")
    intermediate_size = architecture.intermediate_size(reading)
    embedding = reading.file.tensors.get("token_embd.weight")
    vocab_size = reading.optional_integer("vocab_size") if embedding is None else embedding.shape[0]
    values: Values = {
        "vocab_size": vocab_size,
        "hidden_size": reading.integer("embedding_length"),
        "num_hidden_layers": reading.num_layers,
        "num_attention_heads": reading.integer("attention.head_count"),
        "num_key_value_heads": architecture.num_kv_heads(reading),
        "head_dim": head_size,
        "intermediate_size": intermediate_size or None,
        "n_inner": intermediate_size or None,
        "max_position_embeddings": reading.integer("context_length"),
        "rms_norm_eps": reading.optional_number("attention.layer_norm_rms_epsilon"),
        "layer_norm_eps": layer_eps,
        "layer_norm_epsilon": layer_eps,
        "norm_epsilon": layer_eps,
        "rope_theta": reading.number_or(10_000.0, "rope.freq_base"),
        "rope_scaling": rope_scaling(reading),
        "tie_word_embeddings": not reading.has_tensor("output.weight"),
        "attention_bias": has_bias(reading, "attn_q") or has_bias(reading, "attn_qkv"),
        "mlp_bias": has_bias(reading, "ffn_up"),
    }
    rotary_dim = reading.optional_integer("rope.dimension_count")
    if head_size is not None and rotary_dim not in (None, head_size):
        values["partial_rotary_factor"] = rotary_factor(rotary_dim, head_size)
    return values
