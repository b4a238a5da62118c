"""A checkpoint's config, parsed: everything that can be known before any weight is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import footprint
from streamserve.models.families import Family, find_family, has_family, unknown_family
from streamserve.models.families.mtp import MtpLayers
from streamserve.models.families.text_parts import find_text_part
from streamserve.models.hf_config import HfConfig
from streamserve.models.model_config import ModelConfig
from streamserve.models.quantised.stored import stored_quantization
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    ShortConvSpec,
    StateSpaceSpec,
    parts_of,
)
from streamserve.models.tensor_files import open_tensor_files
from streamserve_kernels import Quantization

logger = logging.getLogger(__name__)

# transformers' names for the sampling settings that a model recommends.
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


ModelImpl = Literal["auto", "native", "transformers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeConfig(ModelConfig):
    """Of a family that our decoder runs.

    ``mtp`` is what the config says of layers that guess further tokens, None of families without
    any: see `find_mtp`.
    """

    family: Family
    spec: DecoderSpec
    mtp: MtpLayers | None = None

    def weight_bytes(
        self,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
        num_tokens: int | None = None,
    ) -> int:
        stored = self.stored_quantization
        return footprint.weight_bytes(self.spec, dtype, quantization, stored, num_tokens)


def load_hf_config(
    path: Path | str,
    *,
    model_impl: ModelImpl = "auto",
    trust_remote_code: bool = False,
    hf_overrides: Mapping[str, Any] = MappingProxyType({}),
) -> ModelConfig:
    """`load_config` of a directory: its ``config.json`` and ``generation_config.json``."""
    directory = Path(path)
    values = _overridden(read_json(directory / "config.json", required=True), hf_overrides)
    generation = read_json(directory / "generation_config.json", required=False)
    config = HfConfig(values, str(directory / "config.json"))
    part = None if model_impl == "transformers" else find_text_part(config)
    text = config if part is None else part.config(config, partial(_has_head, directory))
    stated: dict[str, Any] = {
        "eos_token_ids": _token_ids(generation, "eos_token_id")
        or _token_ids(values, "eos_token_id")
        or _token_ids(text.values, "eos_token_id"),
        "dtype": _checkpoint_dtype(config) or _checkpoint_dtype(text),
        "sampling_defaults": _sampling_defaults(generation),
    }
    if part is not None:
        parsed = replace(
            parse_config(text, family=part.family(text), **stated), unserved=part.unserved
        )
    elif model_impl == "transformers" or (model_impl == "auto" and not has_family(config)):
        if hf_overrides:
            raise UnsupportedModelError(
                f"{config.source}: --hf-overrides is for the native decoder's families"
            )
        return _transformers_config(directory, config, stated, model_impl, trust_remote_code)
    else:
        try:
            parsed = parse_config(config, **stated)
        except UnsupportedModelError as refusal:
            if model_impl == "native" or hf_overrides:
                raise
            return _instead(refusal, directory, config, stated, trust_remote_code)
    names = parsed.family.weight_names(parsed.spec)
    stored = stored_quantization(values, directory, names, parsed.spec)
    return replace(parsed, stored_quantization=stored)


def _overridden(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with others in their places; of an object only the names that are given."""
    found = dict(values)
    if isinstance(values.get("rope_parameters"), dict):
        overrides = _as_rope_parameters(overrides)
    for name, value in overrides.items():
        old = found.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            found[name] = {**old, **value}
        else:
            found[name] = value
    return found


def _as_rope_parameters(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with what once had names of its own where configs of today have it."""
    rest = dict(overrides)
    parameters: dict[str, Any] = {
        name: rest.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rest
    }
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rest.get(name), dict):
            parameters |= rest.pop(name)
    if "type" in parameters:
        parameters.setdefault("rope_type", parameters["type"])
    return {**rest, "rope_parameters": parameters} if parameters else rest


def parse_config(
    config: HfConfig,
    *,
    eos_token_ids: tuple[int, ...],
    dtype: torch.dtype | None,
    sampling_defaults: Mapping[str, float],
    family: Family | None = None,
) -> NativeConfig:
    """Of one of our families, found by the config if none is given.

    Raises as `load_config` does.
    """
    family = family or find_family(config)
    spec = family.spec(config)
    _check_heads(spec, config.source)
    longest = _longest_sequence(family, config, spec)
    default = family.default_positions
    return NativeConfig(
        architecture=family.architecture,
        family=family,
        spec=spec,
        max_position_embeddings=longest,
        default_max_model_len=longest if default is None else min(longest, default(config)),
        vocab_size=spec.vocab_size,
        eos_token_ids=eos_token_ids,
        dtype=dtype,
        sampling_defaults=sampling_defaults,
        end_tokens=family.end_tokens,
        mtp=None if family.mtp is None else family.mtp(config),
    )


def _has_head(directory: Path) -> bool:
    try:
        files = open_tensor_files(directory, "auto")
    except ModelLoadError:
        return False  # dummy weights need none; others are looked for again, and missed
    return any(name.endswith("lm_head.weight") for name in files.names())


def _instead(
    refusal: UnsupportedModelError,
    directory: Path,
    config: HfConfig,
    stated: Mapping[str, Any],
    trust_remote_code: bool,
) -> ModelConfig:
    """What the family refuses of a config, transformers may have. Raises the refusal otherwise."""
    try:
        found = _transformers_config(directory, config, stated, "transformers", trust_remote_code)
    except (ModelLoadError, UnsupportedModelError):
        raise refusal from None
    logger.warning("%s: so the model runs through transformers", refusal)
    return found


def _transformers_config(
    directory: Path,
    config: HfConfig,
    stated: Mapping[str, Any],
    model_impl: ModelImpl,
    trust_remote_code: bool,
) -> ModelConfig:
    # It takes seconds to import, which the native families do not pay.
    from streamserve.models.transformers_backend import read_config

    try:
        return read_config(
            directory,
            stated,
            own_code=bool(config.values.get("auto_map")),
            trust_remote_code=trust_remote_code,
        )
    except UnsupportedModelError as error:
        if model_impl == "auto":
            raise unknown_family(config, f"transformers' model cannot run here: {error}") from error
        raise UnsupportedModelError(
            f"{config.source}: transformers' model cannot run here: {error}"
        ) from error


def read_sampling_defaults(directory: Path) -> Mapping[str, float]:
    """What a ``generation_config.json`` recommends. Raises ModelLoadError for a damaged one."""
    return _sampling_defaults(read_json(directory / "generation_config.json", required=False))


def _sampling_defaults(generation: Mapping[str, Any]) -> Mapping[str, float]:
    return {
        name: generation[name]
        for name in SAMPLING_FIELDS
        if isinstance(generation.get(name), int | float)
    }


def read_json(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        if required:
            raise ModelLoadError(f"{path} is not there: this is no model directory") from None
        return {}
    except ValueError as error:
        raise ModelLoadError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path} must hold an object, not {type(values).__name__}")
    return values


def _check_heads(spec: DecoderSpec, source: str) -> None:
    if not spec.attentions():
        raise UnsupportedModelError(f"{source}: a model of which no layer attends is not supported")
    for held in dict.fromkeys(held for layer in spec.layers for held in parts_of(layer.attention)):
        if isinstance(held, ShortConvSpec):
            continue
        if isinstance(held, AttentionSpec):
            heads, shared = held.num_heads, held.num_kv_heads
            what = f"{heads} attention heads cannot share {shared} key/value heads evenly"
        elif isinstance(held, StateSpaceSpec):
            heads, shared = held.num_heads, held.num_groups
            what = f"{heads} heads of a state space cannot share {shared} groups evenly"
        else:
            heads, shared = held.num_value_heads, held.num_key_heads
            what = f"{heads} value heads cannot share {shared} key heads evenly"
        if heads % shared:
            raise ModelLoadError(f"{source}: {what}")


def _longest_sequence(family: Family, config: HfConfig, spec: DecoderSpec) -> int:
    """The stated context times the stretch, where the statement is of the length before it.

    ``linear`` and ``dynamic`` configs state the trained length; ``yarn`` names the trained length
    apart; ``llama3``, ``longrope`` and Qwen 1's state the length after stretching.
    """
    stated = family.max_positions(config)
    ropes = (attention.rope for attention in spec.attentions()[:1])
    scaling = next((rope.scaling for rope in ropes if rope is not None), None)
    kinds = ("llama3", "longrope", "stepped_dynamic", "proportional")
    if scaling is None or scaling.kind in kinds:
        return stated
    if scaling.kind == "yarn":
        return max(stated, int(scaling.original_max_position_embeddings * scaling.factor))
    return int(stated * scaling.factor)


def _checkpoint_dtype(config: HfConfig) -> torch.dtype | None:
    name = config.values.get("dtype", config.values.get("torch_dtype"))
    if not isinstance(name, str):
        return None
    dtype = getattr(torch, name.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _token_ids(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = values.get(name)
    ids = value if isinstance(value, list) else [value]
    return tuple(token for token in ids if isinstance(token, int) and not isinstance(token, bool))
