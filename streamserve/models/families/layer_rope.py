"""Rotary positions that differ by the kind of layer, and of which only the slowest pairs turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamserve.errors import ModelLoadError
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import RopeScaling, RopeSpec


def layer_rope(
    config: HfConfig, layer_type: str, head_size: int, default: Mapping[str, Mapping[str, Any]]
) -> RopeSpec:
    """Those of ``layer_type`` in ``rope_parameters``, or in ``default`` where there are none.

    With ``proportional`` ones pairs turn as fast as those of the whole head do, the first so many
    of them. Raises ModelLoadError, UnsupportedModelError.
    """
    parameters = config.values.get("rope_parameters") or default
    given = parameters.get(layer_type) if isinstance(parameters, Mapping) else None
    if not isinstance(given, Mapping):
        raise ModelLoadError(
            f"{config.source}: rope_parameters must hold an object for {layer_type}, "
            f"got {parameters!r}"
        )
    if given.get("rope_type") != "proportional":
        own = {**config.values, "rope_scaling": None, "rope_parameters": dict(given)}
        return HfConfig(own, config.source).rope(head_size)
    values = HfConfig(given, f"{config.source}: rope_parameters: {layer_type}")
    share = values.number_or(1.0, "partial_rotary_factor")
    return RopeSpec(
        base=values.number_or(10_000.0, "rope_theta"),
        rotary_dim=head_size,
        scaling=RopeScaling(
            kind="proportional",
            factor=values.number_or(1.0, "factor"),
            original_max_position_embeddings=0,  # it stretches nothing up to some length
            turning_pairs=int(share * head_size // 2),
        ),
    )
