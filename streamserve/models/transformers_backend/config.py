"""The config of a model that transformers builds, and the way from it to a model that runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.model import LanguageModel
from streamserve.models.model_config import ModelConfig
from streamserve.models.transformers_backend.loading import load
from streamserve.models.transformers_backend.probe import probe
from streamserve.models.transformers_backend.refusals import OWN_CODE, refuse_by_config
from streamserve.models.transformers_backend.shape import TransformersSpec
from streamserve_kernels import Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersConfig(ModelConfig):
    """As `ModelConfig` says."""

    spec: TransformersSpec
    config: PreTrainedConfig
    trust_remote_code: bool

    def weight_bytes(
        self,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
        num_tokens: int | None = None,
    ) -> int:
        return self.spec.weight_bytes(dtype, quantization, num_tokens)

    def load(self, path: Path, **options: Any) -> LanguageModel:
        """Weights for it: see `streamserve.models.loader.load_model`."""
        return load(
            path, self.config, self.spec, trust_remote_code=self.trust_remote_code, **options
        )


def read_config(
    directory: Path, stated: Mapping[str, Any], *, own_code: bool, trust_remote_code: bool
) -> TransformersConfig:
    """The config in ``directory``; ``stated`` are the fields that mean the same for any model.

    ``own_code``: the checkpoint brings some, which runs with ``trust_remote_code`` only.
    Raises UnsupportedModelError with the reason why transformers' model cannot run here.
    """
    config = _auto_config(directory, own_code=own_code, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            "its weights are quantised (quantization_config), and only plain ones are loaded "
            "(--quantization quantises them on the fly)"
        )
    refuse_by_config(config, trust_remote_code=trust_remote_code)
    longest = _longest_sequence(config)
    spec = probe(config, trust_remote_code=trust_remote_code, max_model_len=longest)
    return TransformersConfig(
        architecture=", ".join(config.architectures or ()) or str(config.model_type),
        spec=spec,
        max_position_embeddings=longest,
        default_max_model_len=longest,
        vocab_size=spec.vocab_size,
        config=config,
        trust_remote_code=trust_remote_code,
        **stated,
    )


def _auto_config(directory: Path, *, own_code: bool, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, OSError, KeyError, ImportError, TypeError) as error:
        if own_code and not trust_remote_code:
            raise UnsupportedModelError(OWN_CODE) from error
        text = str(error).strip()
        first = text.splitlines()[0] if text else type(error).__name__
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot read its config: {first}"
        ) from error
    return config


def _longest_sequence(config: PreTrainedConfig) -> int:
    """The context that the config states, after rotary stretching where the statement is before it.

    Raises ModelLoadError where it states none.
    """
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None)
    if not isinstance(stated, int):
        raise ModelLoadError("config.json lacks max_position_embeddings, an integer")
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or stated
        return max(stated, int(original * (rope.get("factor") or 1.0)))
    if kind in ("linear", "dynamic"):
        return int(stated * rope["factor"])
    return stated
