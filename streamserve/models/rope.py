"""Position encodings that need a table: rotary frequencies, ALiBi slopes, scales of queries.

Frequencies follow transformers' ``modeling_rope_utils`` to the last bit in float32, so that a
checkpoint sees the angles it was trained with. One thing differs on purpose: *dynamic* NTK scaling
(Qwen 1's as well) and *longrope* there follow the longest length seen so far. Keys that are already
in a paged cache cannot be rotated again, so here the frequencies are fixed once, for the longest
length that is served (``max_length``). Up to the trained length that is plain rope, or longrope's
short factors, as in transformers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from streamserve.models.spec import QueryScaleSpec, RopeScaling, RopeSpec


def inverse_frequencies(rope: RopeSpec, max_length: int) -> Tensor:
    """Radians per token of each rotated pair, ``[rotary_dim / 2]`` float32.

    ``max_length`` is the longest sequence that will be served: for ``dynamic`` and ``longrope``.
    """
    dim, base, scaling = rope.rotary_dim, rope.base, rope.scaling
    if scaling is not None and scaling.kind in ("dynamic", "stepped_dynamic"):
        base = _dynamic_ntk_base(base, dim, scaling, max_length)
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    plain = 1.0 / (base**exponents)
    if scaling is None or scaling.kind in ("dynamic", "stepped_dynamic"):
        return plain
    if scaling.kind == "proportional":
        plain[scaling.turning_pairs :] = 0.0
    if scaling.kind in ("linear", "proportional"):
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    if scaling.kind == "longrope":
        is_long = max_length > scaling.original_max_position_embeddings
        factors = scaling.long_factors if is_long else scaling.short_factors
        return 1.0 / (torch.tensor(factors) * base**exponents)
    return _yarn(base**exponents, base, dim, scaling)


def cos_sin_table(rope: RopeSpec, max_length: int, device: torch.device) -> Tensor:
    """``[max_length, rotary_dim]`` float32: cos of every pair, then sin of every pair."""
    frequencies = inverse_frequencies(rope, max_length)
    angles = torch.arange(max_length, dtype=torch.float32)[:, None] * frequencies
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    if rope.scaling is not None and rope.scaling.attention_factor != 1.0:
        table *= rope.scaling.attention_factor
    return table.to(device)


def alibi_slopes(num_heads: int) -> list[float]:
    """Each head's slope (Press et al. 2022); a count that is no power of two fills in between."""
    closest = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / closest) for i in range(closest)]
    extra = [2.0 ** (-4.0 * (i + 1) / closest) for i in range(0, 2 * (num_heads - closest), 2)]
    return slopes + extra


def query_scales(scale: QueryScaleSpec, max_length: int) -> Tensor:
    """What queries are multiplied by, ``[max_length]`` float32; up to the trained length it is 1.

    ``logarithm``: Su 2021, https://kexue.fm/archives/8823.
    """
    positions = torch.arange(max_length, dtype=torch.float64)
    if scale.kind == "logarithm":
        lengths = (positions + 1).clamp_(min=scale.trained)
        return (lengths.log() / math.log(scale.trained)).float()
    steps = positions.div_(scale.trained).floor_()
    return (1 + scale.beta * steps.log1p_()).float()


def _dynamic_ntk_base(base: float, dim: int, scaling: RopeScaling, max_length: int) -> float:
    trained = scaling.original_max_position_embeddings
    length = max(max_length, trained)
    stretch = scaling.factor * length / trained - (scaling.factor - 1)
    if scaling.kind == "stepped_dynamic":
        # In steps: 1 up to the trained length, 3 up to twice that, 7 up to four times.
        stretch = 2 ** math.ceil(math.log2(length / trained) + 1) - 1
    return base * float(stretch ** (dim / (dim - 2)))


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Short wavelengths stay, long ones are divided by the factor, those between are blended."""
    trained = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > trained / low, plain / scaling.factor, plain)
    blend = (trained / wavelength - low) / (high - low)
    blended = (1 - blend) * stretched / scaling.factor + blend * stretched
    between = (wavelength >= trained / high) & (wavelength <= trained / low)
    return torch.where(between, blended, stretched)


def _yarn(powers: Tensor, base: float, dim: int, scaling: RopeScaling) -> Tensor:
    """Pairs that turn often in the trained length stay, those that turn rarely are stretched."""

    def pair_that_turns(rotations: float) -> float:
        trained = scaling.original_max_position_embeddings
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - keep) + 1.0 / powers * keep
