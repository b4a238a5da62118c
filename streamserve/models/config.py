"""A checkpoint's config, parsed: everything that can be known before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import parameters
from streamserve.models.families import Family, find_family
from streamserve.models.hf_config import HfConfig
from streamserve.models.mxfp4 import Mxfp4
from streamserve.models.parameters import StoredQuantization
from streamserve.models.spec import DecoderSpec
from streamserve_kernels import Quantization

# transformers' names for the sampling settings that a model recommends.
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What is served, before it is loaded.

    ``max_position_embeddings`` is the model's own longest sequence in tokens, after rotary
    stretching; ``default_max_model_len`` what is served of it unless more is asked for. ``dtype``
    is the checkpoint's own, None when the config does not say. ``sampling_defaults`` are the
    recommendations of ``generation_config.json``; ``stored_quantization`` is how the weights are
    quantised in the files, None if they are not.
    """

    architecture: str
    family: Family
    spec: DecoderSpec
    max_position_embeddings: int
    default_max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype | None
    sampling_defaults: Mapping[str, float]
    stored_quantization: StoredQuantization | None = None

    def weight_bytes(self, dtype: torch.dtype, quantization: Quantization | None = None) -> int:
        """Bytes that the weights take at most in ``dtype``, or quantised."""
        return parameters.weight_bytes(self.spec, dtype, quantization, self.stored_quantization)

    def resolve_max_model_len(self, requested: int | None) -> int:
        """The longest sequence to serve: the model's default, or ``requested``.

        Raises ModelLoadError when ``requested`` is longer than the model can be given.
        """
        if requested is None:
            return self.default_max_model_len
        if not 1 <= requested <= self.max_position_embeddings:
            raise ModelLoadError(
                f"max_model_len {requested} must be between 1 and "
                f"{self.max_position_embeddings}, the longest sequence of {self.architecture}"
            )
        return requested


def load_hf_config(path: Path | str) -> ModelConfig:
    """Parses ``config.json`` and ``generation_config.json`` of a checkpoint's directory.

    Raises UnsupportedModelError, naming the value and what is supported, for an architecture or a
    setting that is not built; ModelLoadError for a config that is missing or damaged.
    """
    directory = Path(path)
    values = _read_json(directory / "config.json", required=True)
    generation = _read_json(directory / "generation_config.json", required=False)
    config = HfConfig(values, str(directory / "config.json"))
    return parse_config(
        config,
        eos_token_ids=_token_ids(generation, "eos_token_id") or _token_ids(values, "eos_token_id"),
        dtype=_checkpoint_dtype(config),
        sampling_defaults=_sampling_defaults(generation),
    )


def parse_config(
    config: HfConfig,
    *,
    eos_token_ids: tuple[int, ...],
    dtype: torch.dtype | None,
    sampling_defaults: Mapping[str, float],
) -> ModelConfig:
    """Raises as `load_hf_config` does."""
    family = find_family(config)
    stored_quantization = _stored_quantization(config)
    spec = family.spec(config)
    _check_heads(spec, config.source)
    longest = _longest_sequence(family, config, spec)
    default = family.default_positions
    return ModelConfig(
        architecture=family.architecture,
        family=family,
        spec=spec,
        max_position_embeddings=longest,
        default_max_model_len=longest if default is None else min(longest, default(config)),
        vocab_size=spec.vocab_size,
        eos_token_ids=eos_token_ids,
        dtype=dtype,
        sampling_defaults=sampling_defaults,
        stored_quantization=stored_quantization,
    )


def read_sampling_defaults(directory: Path) -> Mapping[str, float]:
    """What a ``generation_config.json`` recommends. Raises ModelLoadError for a damaged one."""
    return _sampling_defaults(_read_json(directory / "generation_config.json", required=False))


def _sampling_defaults(generation: Mapping[str, Any]) -> Mapping[str, float]:
    return {
        name: generation[name]
        for name in SAMPLING_FIELDS
        if isinstance(generation.get(name), int | float)
    }


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
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


def _stored_quantization(config: HfConfig) -> StoredQuantization | None:
    quantisation = config.values.get("quantization_config")
    if not quantisation:
        return None
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if method == "mxfp4":
        return Mxfp4()
    raise UnsupportedModelError(
        f"{config.source}: quantization_config (quant_method {method!r}) is not supported; "
        "only unquantised weights are (--quantization quantises them on the fly)"
    )


def _check_heads(spec: DecoderSpec, source: str) -> None:
    for layer in spec.layers:
        attention = layer.attention
        if attention.num_heads % attention.num_kv_heads:
            raise ModelLoadError(
                f"{source}: {attention.num_heads} attention heads "
                f"cannot share {attention.num_kv_heads} key/value heads evenly"
            )


def _longest_sequence(family: Family, config: HfConfig, spec: DecoderSpec) -> int:
    """The stated context times the stretch, where the statement is of the length before it.

    ``linear`` and ``dynamic`` configs state the trained length; ``yarn`` names the trained length
    apart; ``llama3``, ``longrope`` and Qwen 1's state the length after stretching.
    """
    stated = family.max_positions(config)
    rope = spec.layers[0].attention.rope
    scaling = rope.scaling if rope is not None else None
    if scaling is None or scaling.kind in ("llama3", "longrope", "qwen_dynamic"):
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
