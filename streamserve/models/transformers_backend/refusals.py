"""What can be seen of a model, before it is built, that a paged cache does not serve."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.text_parts import TEXT_PARTS

# Of parts of a config that split up the same language model.
_INNER = ("text_config", "attn_config", "ffn_config")
# In the names of kinds of layers that are no attention.
_STATEFUL = ("linear", "mamba", "ssm", "conv", "recurrent", "delta", "hybrid")


OWN_CODE = "its model is code of its own, which runs with --trust-remote-code only"


def refuse_by_config(config: PreTrainedConfig, *, trust_remote_code: bool) -> None:
    """Raises UnsupportedModelError for what a config says of a model, and its class if known."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError("it is an encoder with a decoder")
    parts = [
        name
        for name, part in vars(config).items()
        if isinstance(part, PreTrainedConfig) and name not in _INNER
    ]
    if parts:
        raise UnsupportedModelError(
            f"it has parts for more than text ({', '.join(parts)}), and the text part is served "
            f"of these: {', '.join(TEXT_PARTS)}"
        )
    for kind in getattr(config, "layer_types", None) or ():
        if any(name in str(kind) for name in _STATEFUL):
            raise UnsupportedModelError(
                f"its layers of the kind {kind!r} keep a state that is no KV cache"
            )
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        if not trust_remote_code:
            raise UnsupportedModelError(OWN_CODE)
        return
    _refuse_other_task(config)
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    model_class = mapping.get(type(config), None)
    if isinstance(model_class, type):
        refuse_by_class(model_class)


def _refuse_other_task(config: PreTrainedConfig) -> None:
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if known is None:
        raise UnsupportedModelError(
            f"transformers has no causal language model of model_type {config.model_type!r}"
        )
    named: Any = getattr(config, "architectures", None) or []
    classes = [known] if isinstance(known, str) else list(known)
    if named and not set(named) & set(classes):
        raise UnsupportedModelError(
            f"{', '.join(map(str, named))} is not its causal language model, {', '.join(classes)}"
        )


def refuse_by_class(model_class: type[PreTrainedModel]) -> None:
    """Raises UnsupportedModelError for what a model's class says of it."""
    if getattr(model_class, "_is_stateful", False):
        raise UnsupportedModelError(
            "it has layers (state spaces, linear attention) whose state is no KV cache"
        )
    if not model_class._can_set_attn_implementation():
        raise UnsupportedModelError(
            "its attention does not go through transformers' attention interface"
        )
