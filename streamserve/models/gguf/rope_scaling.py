"""How rotary positions are stretched, by what a GGUF file says or has tensors of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamserve.errors import UnsupportedModelError
from streamserve.models.gguf.architecture import Values

if TYPE_CHECKING:
    from streamserve.models.gguf.reading import Reading


def rope_scaling(reading: Reading) -> Values | None:
    context = reading.integer("context_length")
    original = reading.integer_or(context, "rope.scaling.original_context_length")
    path, factor = reading.file.path, reading.optional_number("rope.scaling.factor")
    if reading.has_tensor("rope_freqs.weight"):
        # What Llama 3's stretch makes of each frequency, computed by the converter.
        factors = reading.floats("rope_freqs.weight")
        return _longrope(factors, factors, original, 1.0)
    if reading.has_tensor("rope_factors_long.weight"):
        short, long = (reading.floats(f"rope_factors_{kind}.weight") for kind in ("short", "long"))
        return _longrope(short, long, original, reading.number_or(1.0, "rope.scaling.attn_factor"))
    kind = reading.file.metadata.optional_text(reading.key("rope.scaling.type"))
    if kind is None and (older := reading.optional_number("rope.scale_linear")) is not None:
        kind, factor = "linear", older
    if kind in (None, "none") or (kind == "linear" and factor in (None, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": reading.optional_number("rope.scaling.yarn_attn_factor"),
            "beta_fast": reading.optional_number("rope.scaling.yarn_beta_fast"),
            "beta_slow": reading.optional_number("rope.scaling.yarn_beta_slow"),
        }
    raise UnsupportedModelError(
        f"{path}: {reading.key('rope.scaling.type')} {kind!r} is not supported without the "
        "tensors rope_factors_long and rope_factors_short; these are: none, linear, yarn"
    )


def _longrope(
    short: list[float], long: list[float], original: int, attention_factor: float
) -> Values:
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "original_max_position_embeddings": original,
        "attention_factor": attention_factor,
        "short_factor": short,
        "long_factor": long,
    }
