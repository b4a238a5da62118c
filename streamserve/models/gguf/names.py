"""Where a GGUF file keeps each weight: one table for every architecture.

llama.cpp gives a tensor the same name in each of them; what differs is which ones there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from streamserve.models.names import WeightNames

_BLOCK = "blk.{layer}."


def _block(*names: str) -> tuple[str, ...]:
    return tuple(_BLOCK + name for name in names)


# Each module's tensors, in the order of preference: the first whose first tensor some layer has.
_ALTERNATIVES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "embedding": (("token_embd",),),
    "position_embedding": (("position_embd",),),
    "embedding_norm": (("token_embd_norm",),),
    "final_norm": (("output_norm",),),
    "head": (("output",),),
    # Falcon 40B's attention has the second of two.
    "layers.attention_norm": (_block("attn_norm_2"), _block("attn_norm")),
    "layers.attention_post_norm": (_block("post_attention_norm"),),
    # Where there is none of its own, gpt-oss's follows the attention, Falcon 40B's goes before it.
    "layers.mlp_norm": (
        _block("ffn_norm"),
        _block("post_attention_norm"),
        _block("attn_norm"),
    ),
    "layers.mlp_post_norm": (_block("post_ffw_norm"),),
    "layers.qkv": (_block("attn_qkv"), _block("attn_q", "attn_k", "attn_v")),
    "layers.q_norm": (_block("attn_q_norm"),),
    "layers.k_norm": (_block("attn_k_norm"),),
    "layers.output": (_block("attn_output"),),
    "layers.sinks": (_block("attn_sinks.weight"),),
    "layers.gate_up": (_block("ffn_gate", "ffn_up"), _block("ffn_up")),
    "layers.up": (_block("ffn_up"),),
    "layers.down": (_block("ffn_down"),),
    "layers.router": (_block("ffn_gate_inp"),),
    "layers.experts.gate_up": (
        _block("ffn_gate_up_exps.{expert}"),
        _block("ffn_gate_exps.{expert}", "ffn_up_exps.{expert}"),
        _block("ffn_gate.{expert}", "ffn_up.{expert}"),
    ),
    "layers.experts.down": (_block("ffn_down_exps.{expert}"), _block("ffn_down.{expert}")),
    "layers.shared.gate": (_block("ffn_gate_inp_shexp"),),
    "layers.shared.gate_up": (_block("ffn_gate_shexp", "ffn_up_shexp"),),
    "layers.shared.down": (_block("ffn_down_shexp"),),
}
# Read with the config, and what older converters left in.
_IGNORED = (
    r"rope_freqs\.weight",
    r"rope_factors_(long|short)\.weight",
    r"attn_rot_embd\.weight",
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def weight_names(tensors: Mapping[str, object]) -> WeightNames:
    """The table for a file that holds these tensors (experts one by one)."""
    held = {_NUMBER.sub("0", name) for name in tensors}

    def is_held(template: str) -> bool:
        name = template.format(layer=0, expert=0)
        return name in held or f"{name}.weight" in held

    return WeightNames(
        {
            module: next((names for names in choices if is_held(names[0])), choices[-1])
            for module, choices in _ALTERNATIVES.items()
        },
        ignored=_IGNORED,
    )
