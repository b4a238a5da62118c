"""What is known of a model before it is loaded, whoever computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from streamserve.errors import ModelLoadError
from streamserve.models.model_shape import ModelShape
from streamserve.models.parameters import StoredQuantization
from streamserve_kernels import Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is served, before it is loaded: by our decoder, or by a model of transformers.

    ``max_position_embeddings`` is the model's own longest sequence in tokens, after rotary
    stretching; ``default_max_model_len`` what is served of it unless more is asked for. ``dtype``
    is the checkpoint's own, None when the config does not say. ``sampling_defaults`` are the
    recommendations of ``generation_config.json``; ``stored_quantization`` is how the weights are
    quantised in the files, None if they are not. ``end_tokens`` end an answer besides
    ``eos_token_ids``. ``unserved`` is what the checkpoint has a part for that is left out, as
    "images".
    """

    architecture: str
    spec: ModelShape
    max_position_embeddings: int
    default_max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype | None
    sampling_defaults: Mapping[str, float]
    stored_quantization: StoredQuantization | None = None
    end_tokens: tuple[str, ...] = ()
    unserved: str = ""

    def weight_bytes(
        self,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
        num_tokens: int | None = None,
    ) -> int:
        """Bytes that the weights take at most in ``dtype``, or quantised.

        With ``num_tokens`` those that a step of so many tokens uses: an expert as far as one of
        them is likely to go there, if all experts are equally likely.
        """
        raise NotImplementedError

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
