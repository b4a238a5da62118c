"""Rotary frequencies that would change with what is in a step, fixed for the longest sequence."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from streamserve.errors import UnsupportedModelError

_CHANGING = ("dynamic", "longrope")


def freeze(model: nn.Module, max_model_len: int) -> None:
    """As the native families do: what ``max_model_len`` asks for holds for shorter texts too."""
    for module in model.modules():
        rotary: Any = cast(Any, module)
        kind = getattr(rotary, "rope_type", None)
        if isinstance(kind, dict):
            changing = [name for name in kind.values() if _is_changing(name)]
            if changing:
                raise UnsupportedModelError(
                    f"its rotary frequencies ({changing[0]}) differ by layer and by a text's length"
                )
        elif isinstance(kind, str) and _is_changing(kind) and hasattr(rotary, "inv_freq"):
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](
                rotary.config, rotary.inv_freq.device, seq_len=max_model_len
            )
            rotary.inv_freq = rotary.original_inv_freq = frequencies
            rotary.attention_scaling = scaling
            rotary.rope_type = "default"


def _is_changing(kind: object) -> bool:
    return isinstance(kind, str) and any(name in kind for name in _CHANGING)
