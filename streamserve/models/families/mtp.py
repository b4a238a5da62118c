"""Layers that guess further tokens (multi-token prediction), as Qwen's hybrids have them.

Behind the model's own layers there is one more that attends, whose input is a product of the next
token's embedding and the hidden state that the model's head was given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    ExpertsSpec,
    JoinSpec,
    LayerSpec,
)

PREFIX = "mtp."
_JOIN = {
    "join.embedding_norm": (PREFIX + "pre_fc_norm_embedding",),
    "join.hidden_norm": (PREFIX + "pre_fc_norm_hidden",),
    "join.product": (PREFIX + "fc",),
    "final_norm": (PREFIX + "norm",),
}


@dataclass(frozen=True, slots=True)
class MtpLayers:
    """What a config says of them; ``count`` is None where it says nothing (Qwen 3-Next)."""

    count: int | None
    own_embedding: bool


def mtp_layers(config: HfConfig) -> MtpLayers:
    count = config.optional_integer("mtp_num_hidden_layers", minimum=0)
    return MtpLayers(count, config.flag_or(False, "mtp_use_dedicated_embeddings"))


def head_spec(spec: DecoderSpec) -> DecoderSpec:
    """One such layer of a model, with the model's embedding and head."""
    assert spec.final_norm is not None
    layer = max((layer for layer in spec.layers if _attends(layer)), key=_has_experts)
    return replace(spec, layers=(layer,), tied_head=True, join=JoinSpec(spec.final_norm))


def _attends(layer: LayerSpec) -> bool:
    return isinstance(layer.attention, AttentionSpec)


def _has_experts(layer: LayerSpec) -> bool:
    return isinstance(layer.mlp, ExpertsSpec)


def head_names(names: WeightNames) -> WeightNames:
    """Those of such a layer, where the model's are ``names``."""

    def moved(templates: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(t.replace("model.layers.", PREFIX + "layers.", 1) for t in templates)

    return replace(
        names,
        modules={**{module: moved(t) for module, t in names.modules.items()}, **_JOIN},
        apart={module: moved(t) for module, t in names.apart.items()},
        skipped=(),
        kept=(PREFIX,),
    )
