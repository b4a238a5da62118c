"""What is known of a share of a model before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from streamserve.errors import ConfigError
from streamserve.models import footprint
from streamserve.models.config import NativeConfig
from streamserve.models.model_config import ModelConfig
from streamserve.models.tensor_parallel.share import Share
from streamserve.models.tensor_parallel.source import ShareQuantization
from streamserve_kernels import Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareConfig(NativeConfig):
    """A rank's: ``spec`` is what it computes."""

    share: Share

    def weight_bytes(
        self,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
        num_tokens: int | None = None,
    ) -> int:
        """Bytes of what the rank holds."""
        stored = self.stored_quantization
        held = None if stored is None else ShareQuantization(stored, self.share)
        return footprint.weight_bytes(self.share.held, dtype, quantization, held, num_tokens)


def share_config(config: ModelConfig, rank: int, size: int) -> ShareConfig:
    """Rank ``rank``'s of ``size``. Raises ConfigError for what cannot be divided so."""
    if not isinstance(config, NativeConfig):
        raise ConfigError(
            "--tensor-parallel-size must be 1 for models through transformers (only a decoder of "
            f"ours is divided, and there is none for {config.architecture}), got {size}"
        )
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    share = Share(config.spec, rank, size)
    return ShareConfig(**{**values, "spec": share.spec}, share=share)
