"""Where a GGUF file keeps each weight: one table for every architecture.

llama.cpp gives a tensor the same name in each of them; what differs is which ones there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from streamserve.models.gguf.architecture import Architecture
from streamserve.models.names import WeightNames

_BLOCK = "blk.{layer}."


def _block(*names: str) -> tuple[str, ...]:
    return tuple(_BLOCK + name for name in names)


_ATTENTION = _block("attn_q", "attn_k", "attn_v")
# Each module's tensors, in the order of preference: the first whose first tensor some layer has.
_ALTERNATIVES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "embedding": (("token_embd",),),
    "position_embedding": (("position_embd",),),
    "embedding_norm": (("token_embd_norm",),),
    "per_layer.embedding": (("per_layer_token_embd",),),
    "per_layer.product": (("per_layer_model_proj",),),
    "per_layer.norm": (("per_layer_proj_norm",),),
    # LFM 2's has the name of one after the embedding.
    "final_norm": (
        ("output_norm",),
        ("token_embd_norm",),
        _block("nextn.shared_head_norm"),
        ("output_norm",),
    ),
    "head": (("output",),),
    "join.embedding_norm": (_block("nextn.enorm"),),
    "join.hidden_norm": (_block("nextn.hnorm"),),
    "join.product": (_block("nextn.eh_proj"),),
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
    "layers.qkv": (_block("attn_qkv"), _ATTENTION),
    "layers.query_key": (_block("attn_q", "attn_k"),),
    "layers.query": (_block("attn_q"),),
    "layers.q_norm": (_block("attn_q_norm"),),
    "layers.k_norm": (_block("attn_k_norm"),),
    "layers.output": (_block("attn_output"),),
    "layers.sinks": (_block("attn_sinks.weight"),),
    "layers.latent.input": (
        _block("attn_q_a", "attn_kv_a_mqa"),
        _block("attn_q", "attn_kv_a_mqa"),
    ),
    "layers.latent.query_norm": (_block("attn_q_a_norm"),),
    "layers.latent.query": (_block("attn_q_b"),),
    "layers.latent.norm": (_block("attn_kv_a_norm"),),
    "layers.latent.heads": (_block("attn_kv_b"),),
    # The converter's first way with Qwen 3-Next left it whole.
    "layers.delta.qkvz": (_block("ssm_in"), _block("attn_qkv", "attn_gate")),
    "layers.delta.gates": (_block("ssm_ba"), _block("ssm_beta", "ssm_alpha")),
    "layers.delta.conv": (_block("ssm_conv1d"),),
    "layers.delta.decay": (_block("ssm_a"),),
    "layers.delta.time_bias": (_block("ssm_dt.bias"),),
    "layers.delta.norm": (_block("ssm_norm"),),
    "layers.delta.output": (_block("ssm_out"),),
    "layers.space.input": (_block("ssm_in"),),
    "layers.space.conv": (_block("ssm_conv1d"),),
    "layers.space.decay": (_block("ssm_a"),),
    "layers.space.time_bias": (_block("ssm_dt.bias"),),
    "layers.space.skip": (_block("ssm_d"),),
    "layers.space.norm": (_block("ssm_norm"),),
    "layers.space.output": (_block("ssm_out"),),
    "layers.short_conv.input": (_block("shortconv.in_proj"),),
    "layers.short_conv.conv": (_block("shortconv.conv"),),
    "layers.short_conv.output": (_block("shortconv.out_proj"),),
    "layers.gate_up": (_block("ffn_gate", "ffn_up"), _block("ffn_up")),
    "layers.up": (_block("ffn_up"),),
    "layers.down": (_block("ffn_down"),),
    "layers.router": (_block("ffn_gate_inp"),),
    "layers.router.correction": (_block("exp_probs_b.bias"),),
    "layers.experts.gate_up": (
        _block("ffn_gate_up_exps.{expert}"),
        _block("ffn_gate_exps.{expert}", "ffn_up_exps.{expert}"),
        _block("ffn_gate.{expert}", "ffn_up.{expert}"),
    ),
    "layers.experts.down": (_block("ffn_down_exps.{expert}"), _block("ffn_down.{expert}")),
    "layers.experts.up": (_block("ffn_up_exps.{expert}"),),
    "layers.shared.up": (_block("ffn_up_shexp"),),
    "layers.shared.gate": (_block("ffn_gate_inp_shexp"),),
    # Gemma 4's is the MLP that its experts stand beside.
    "layers.shared.gate_up": (
        _block("ffn_gate_shexp", "ffn_up_shexp"),
        _block("ffn_gate", "ffn_up"),
    ),
    "layers.shared.down": (_block("ffn_down_shexp"), _block("ffn_down")),
    "layers.router.norm": (_block("ffn_gate_inp.scale"),),
    "layers.router.scales": (_block("ffn_down_exps.scale"),),
    "layers.experts.norm": (_block("pre_ffw_norm_2"),),
    "layers.experts.post_norm": (_block("post_ffw_norm_2"),),
    "layers.shared.norm": (_block("ffn_norm"),),
    "layers.shared.post_norm": (_block("post_ffw_norm_1"),),
    "layers.per_layer.gate": (_block("inp_gate"),),
    "layers.per_layer.output": (_block("proj"),),
    "layers.per_layer.norm": (_block("post_norm"),),
    "layers.scalar": (_block("layer_output_scale.weight"),),
}
# Read with the config, and what older converters left in.
_IGNORED = (
    r"rope_freqs\.weight",
    r"rope_factors_(long|short)\.weight",
    r"attn_rot_embd\.weight",
    r"attn_[kv]_b\.weight",  # see `tensors`
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def weight_names(
    tensors: Mapping[str, object], architecture: Architecture, block: int | None = None
) -> WeightNames:
    """The table for a file that holds these tensors (experts one by one), or for one ``block``."""
    held = {_NUMBER.sub("0", name) for name in tensors}

    def is_held(template: str) -> bool:
        name = template.format(layer=0, expert=0)
        return name in held or f"{name}.weight" in held

    modules = {
        module: next((names for names in choices if is_held(names[0])), choices[-1])
        for module, choices in _ALTERNATIVES.items()
    }
    if architecture.qkv_layout == "gated":  # the other is a delta net's, and has its name
        modules["layers.qkv"] = _ATTENTION
    if block is not None:
        of_block = f"blk.{block}."
        modules = {
            m: tuple(n.replace(_BLOCK, of_block) for n in names) for m, names in modules.items()
        }
    return WeightNames(
        modules,
        qkv_layout=architecture.qkv_layout,
        delta_layout=architecture.delta_layout,
        ignored=_IGNORED,
    )
