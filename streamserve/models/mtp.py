"""Multi-token prediction: the draft head that a checkpoint of Qwen's hybrids brings along.

    mtp = find_mtp(path, config)                    # before any weight: plan memory from it
    head = load_mtp_head(mtp, target)

The arithmetic is that of vLLM's qwen3_next_mtp.py: h is the target's hidden state of a token behind
its final norm, e the embedding of the next token, and a norm is one of Qwen's, weight + 1.

    x = product([norm(e), norm(h)])
    x = a layer that attends, as the target has them, in a cache of its own, at the token's position
    x = norm(x)                             # what stands in for h at the next position
    logits = the target's head of x
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import footprint
from streamserve.models.batch import ForwardBatch, KVCache
from streamserve.models.config import NativeConfig
from streamserve.models.decoder import Decoder
from streamserve.models.families.mtp import head_names, head_spec
from streamserve.models.gguf.config import gguf_head_quantization
from streamserve.models.gguf.container import gguf_file
from streamserve.models.head_decoder import HeadDecoder
from streamserve.models.hub import LoadFormat
from streamserve.models.layers import BoundNorm, bind_norm
from streamserve.models.loader import directory_files, weight_source
from streamserve.models.model_config import ModelConfig
from streamserve.models.names import WeightNames
from streamserve.models.parameters import (
    StoredQuantization,
    decoder_modules,
    module_quantization,
)
from streamserve.models.quantised.stored import CheckpointQuantization
from streamserve.models.spec import DecoderSpec
from streamserve.models.weights import DecoderWeights, Progress, build_weights
from streamserve_kernels import Kernels, PackedLinear, Quantization, QuantLinear
from streamserve_kernels.quantised import packed_bytes

_LARGEST_COPY = 0.75  # of the head's bytes
_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class MtpConfig:
    """A head of the model that ``target`` is the config of, before it is loaded.

    ``spec`` is that of its one layer; ``stored_quantization`` how the files have it quantised.
    """

    path: Path
    target: NativeConfig
    load_format: LoadFormat
    spec: DecoderSpec
    names: WeightNames
    stored_quantization: StoredQuantization | None

    @property
    def taps(self) -> tuple[int, ...]:
        """Of the target: what its last layer leaves."""
        return (len(self.target.spec.layers),)

    def weight_bytes(
        self,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
        target_quantization: Quantization | None = None,
        *,
        copy: Quantization | None = None,
    ) -> int:
        """Bytes that its own weights take at most: see `load_mtp_head`.

        ``target_quantization`` is what the target's are quantised to as they are loaded.
        """
        own = footprint.weight_bytes(self.spec, dtype, quantization, self.stored_quantization)
        head_bytes = self._target_head_bytes(dtype, target_quantization)
        return own + _copy_bytes(copy or quantization, self.spec, head_bytes)

    def _target_head_bytes(self, dtype: torch.dtype, quantization: Quantization | None) -> int:
        stored, spec = self.target.stored_quantization, self.target.spec
        name = "embedding" if spec.tied_head else "head"
        head = next(module for module in decoder_modules(spec) if module.name == name)
        kept = None if stored is None else stored.format(head)
        if kept is not None:
            return kept.nbytes(spec.vocab_size, spec.hidden_size)
        held = module_quantization(head, spec, quantization)
        if held is not None:
            return packed_bytes(held, spec.vocab_size, spec.hidden_size)
        return spec.vocab_size * spec.hidden_size * dtype.itemsize


def _copy_bytes(quantization: Quantization | None, spec: DecoderSpec, head_bytes: int) -> int:
    """What a copy of the target's head takes; 0: a guess from a copy would read hardly less."""
    if quantization is None:
        return 0
    size = packed_bytes(quantization, spec.vocab_size, spec.hidden_size)
    return size if size < _LARGEST_COPY * head_bytes else 0


def find_mtp(path: Path | str, config: ModelConfig, load_format: LoadFormat = "auto") -> MtpConfig:
    """The head of a checkpoint whose config is known; ``dummy`` weights need no tensors.

    Raises ModelLoadError where the checkpoint has none, UnsupportedModelError for one that is not
    built.
    """
    path = Path(path)
    if not isinstance(config, NativeConfig) or config.mtp is None:
        raise UnsupportedModelError(
            f"{path}: {config.architecture} has no layers that guess further tokens (multi-token "
            "prediction)"
        )
    if config.mtp.own_embedding:
        raise UnsupportedModelError(f"{path}: mtp_use_dedicated_embeddings is not supported")
    names, spec = head_names(config.family.weight_names(config.spec)), head_spec(config.spec)
    stored: StoredQuantization | None = None
    count = config.mtp.count
    if load_format == "dummy":
        count = 1 if count is None else count
    elif (file := gguf_file(path)) is not None:
        stored = gguf_head_quantization(file, spec) if count else None
    else:
        found = _num_layers(names.asked(directory_files(path, load_format).names()))
        count = found if count is None else min(count, found)
        if isinstance(config.stored_quantization, CheckpointQuantization):
            stored = config.stored_quantization.of(names, spec)
    if not count:
        raise ModelLoadError(
            f"{path}: the checkpoint has no layers that guess further tokens (mtp); those that "
            "transformers has saved again lack them"
        )
    if count > 1:
        raise UnsupportedModelError(
            f"{path}: {count} layers that guess further tokens (mtp) are not supported; 1 is"
        )
    return MtpConfig(path, config, load_format, spec, names, stored)


def _num_layers(stored: list[str]) -> int:
    found = (_LAYER.match(name) for name in stored)
    return max((int(layer[1]) + 1 for layer in found if layer is not None), default=0)


def load_mtp_head(
    mtp: MtpConfig,
    target: Decoder,
    *,
    quantization: Quantization | None = None,
    copy: Quantization | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> MtpHead:
    """Loads the head that `find_mtp` found, with the embedding and the head of ``target``.

    ``quantization`` is of its own plain layers, ``copy`` (the same, if it is not given) of a copy
    of the target's head, where that takes much more: guesses need only be likely. Raises
    ModelLoadError.
    """
    copy = copy or quantization
    kernels, dtype, device = target.kernels, target.dtype, target.device
    source = weight_source(
        mtp.path, mtp.spec, mtp.names, mtp.stored_quantization, mtp.load_format, seed
    )
    weights = build_weights(mtp.spec, source, kernels, dtype, device, progress, quantization)
    weights.borrowed = target.around()
    head = weights.borrowed.linears["head"]
    if copy is not None and _copy_bytes(copy, mtp.spec, head.nbytes):
        weights.outer.linears["head"] = kernels.prepare_quantised(_rows(head, device), None, copy)
    return MtpHead(
        mtp.spec,
        weights,
        kernels,
        dtype=dtype,
        device=device,
        max_model_len=target.max_model_len,
        taps=mtp.taps,
        norm_of_target=target.final_norm,
    )


def _rows(head: PackedLinear, device: torch.device) -> Tensor:
    """Its weight [V, H], in its dtype."""
    if isinstance(head, QuantLinear):
        return head.rows(torch.arange(head.out_features, device=device))
    return head.unpack()


class MtpHead(HeadDecoder):
    """`DraftHead` of one layer. See `Decoder` for what else it does."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: DecoderWeights,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        taps: tuple[int, ...],
        norm_of_target: BoundNorm,
    ) -> None:
        self.taps = taps
        self._norm_of_target = norm_of_target
        super().__init__(
            spec, weights, kernels, dtype=dtype, device=device, max_model_len=max_model_len
        )

    def _bind(self, kernels: Kernels) -> None:
        super()._bind(kernels)
        join, outer = self.spec.join, self._weights.outer
        assert join is not None
        self._of_embedding = bind_norm(join.norm, outer.norms["join.embedding_norm"], kernels)
        self._of_hidden = bind_norm(join.norm, outer.norms["join.hidden_norm"], kernels)
        self._product = outer.linears["join.product"]

    def _embed(self, batch: ForwardBatch) -> Tensor:
        assert batch.hidden_states is not None, "a head is given the target's"
        embedding = self._of_embedding.norm(super()._embed(batch))
        hidden_states = self._of_hidden.norm(batch.hidden_states)
        return self._product(self.kernels.side_by_side((embedding, hidden_states)))

    def take(self, states: Tensor) -> Tensor:
        """See `DraftHead`."""
        return self._norm_of_target.norm(states)

    def guess(self, batch: ForwardBatch, kv_caches: KVCache) -> tuple[Tensor, Tensor]:
        """See `DraftHead`."""
        token_ids, normed, _ = self._guess(batch, kv_caches)
        return token_ids, normed
