"""What a GGUF file holds, before any weight is read: the same `ModelConfig` as of a directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from streamserve.models.config import NativeConfig, parse_config
from streamserve.models.gguf.architecture import Architecture
from streamserve.models.gguf.config_values import config_values, find_architecture
from streamserve.models.gguf.container import open_gguf
from streamserve.models.gguf.names import weight_names
from streamserve.models.gguf.reading import Reading
from streamserve.models.gguf.source import GgufQuantization, GgufSource
from streamserve.models.gguf.special_tokens import end_token_ids
from streamserve.models.gguf.tensors import GgufTensors
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.parameters import decoder_modules
from streamserve.models.spec import DecoderSpec

_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def load_gguf_config(path: Path) -> NativeConfig:
    """Raises UnsupportedModelError or ModelLoadError, which name the file, key or tensor."""
    reading, architecture = _read(path)
    config = HfConfig(config_values(reading, architecture), str(reading.file.path))
    tensors = GgufTensors(reading, architecture)
    parsed = parse_config(
        config,
        eos_token_ids=end_token_ids(reading.file.metadata),
        dtype=_dtype(tensors),
        sampling_defaults=_sampling_defaults(reading),
    )
    names = weight_names(dict.fromkeys(tensors.names()), architecture)
    return replace(parsed, stored_quantization=_quantization(tensors, names, parsed.spec))


def gguf_source(path: Path, spec: DecoderSpec) -> GgufSource:
    """The weights of the file's decoder, or of its draft head. Raises ModelLoadError."""
    return GgufSource(*_tables(path, spec), spec, path)


def gguf_head_quantization(path: Path, spec: DecoderSpec) -> GgufQuantization | None:
    """How the file's draft head is packed, if it is."""
    return _quantization(*_tables(path, spec), spec)


def _tables(path: Path, spec: DecoderSpec) -> tuple[GgufTensors, WeightNames]:
    reading, architecture = _read(path)
    is_head = spec.join is not None
    tensors = GgufTensors(reading, architecture, of_guess=is_head)
    block = reading.num_layers if is_head else None
    return tensors, weight_names(dict.fromkeys(tensors.names()), architecture, block)


def _read(path: Path) -> tuple[Reading, Architecture]:
    reading = Reading(open_gguf(path))
    return reading, find_architecture(reading)


def _quantization(
    tensors: GgufTensors, names: WeightNames, spec: DecoderSpec
) -> GgufQuantization | None:
    found = GgufQuantization.of(tensors, names, spec)
    is_packed = any(found.kinds(module) is not None for module in decoder_modules(spec))
    return found if is_packed else None


def _dtype(tensors: GgufTensors) -> torch.dtype | None:
    """What the matrices are in, if they are plain; norms are float32 whatever they were."""
    plain = (tensors.dtype(n) for n in tensors.names() if len(tensors.shape(n)) == 2)
    common = Counter(dtype for dtype in plain if dtype is not None).most_common(1)
    return common[0][0] if common else None


def _sampling_defaults(reading: Reading) -> Mapping[str, float]:
    values = {name: reading.file.metadata.optional_number(key) for key, name in _SAMPLING.items()}
    return {name: value for name, value in values.items() if value is not None}
