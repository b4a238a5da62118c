"""EAGLE-3 (Li et al. 2025): a draft head in a checkpoint of its own, trained for one model.

    config = load_eagle3_config(path)               # before any weight: plan memory from it
    config.check_target(target_config.spec)
    head = load_eagle3_head(config, target)
    target.tap(head.taps)                           # before the target is recorded

The arithmetic is that of vLLM's llama_eagle3.py: h is what the head is given for a token, at first
a product of hidden states of the target (`take`), e the embedding of the next token.

    x = attention([norm(e), norm(h)])               # in a cache of its own, at the token's position
    h = h + x, then a Llama's MLP; further layers are a Llama's
    logits = head(norm(h))                          # of some tokens of the target's, or of all
    h stands in for a hidden state at the next position
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import footprint
from streamserve.models.batch import ForwardBatch, KVCache
from streamserve.models.block import Block
from streamserve.models.checkpoint import CheckpointSource, RandomSource, WeightSource
from streamserve.models.config import read_json
from streamserve.models.decoder import Decoder
from streamserve.models.families.eagle3 import (
    Eagle3Layers,
    default_taps,
    eagle3_names,
    full_name,
    read_eagle3,
)
from streamserve.models.head_decoder import HeadDecoder
from streamserve.models.hf_config import HfConfig
from streamserve.models.layers import BoundNorm, bind_norm
from streamserve.models.names import WeightNames
from streamserve.models.quantised.stored import CheckpointQuantization, stored_quantization
from streamserve.models.spec import DecoderSpec, FusionSpec
from streamserve.models.tensor_files import FileFormat, TensorFiles, open_tensor_files
from streamserve.models.weights import DecoderWeights, Progress, Weights, build_weights
from streamserve_kernels import Kernels, Quantization

HeadFormat = FileFormat | Literal["auto", "dummy"]

_TARGET_IDS = "d2t"
_ROWS_COMPARED = 4096  # of two embeddings at once


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """A head before it is loaded. ``spec`` is that of its layers, and for its KV cache.

    A position may be any: how long the sequences were that it was trained on bounds nothing.
    """

    path: Path
    load_format: HeadFormat
    layers: Eagle3Layers
    names: WeightNames
    stored_quantization: CheckpointQuantization | None

    @property
    def spec(self) -> DecoderSpec:
        return self.layers.spec

    @property
    def join(self) -> FusionSpec:
        join = self.spec.join
        assert isinstance(join, FusionSpec)
        return join

    def weight_bytes(self, dtype: torch.dtype, quantization: Quantization | None = None) -> int:
        """Bytes that its own weights take at most, in ``dtype`` or quantised."""
        return footprint.weight_bytes(self.spec, dtype, quantization, self.stored_quantization)

    def taps(self, num_layers: int) -> tuple[int, ...]:
        """The layers of a target with so many whose inputs it is given; one more is the output."""
        named = self.layers.taps
        return default_taps(num_layers) if named is None else named

    def check_target(self, target: DecoderSpec) -> None:
        """Raises UnsupportedModelError, naming the value, for a model that it is not for."""
        join, num_layers = self.join, len(target.layers)
        taps = self.taps(num_layers)
        wrong = None
        if target.hidden_size != join.target_size:
            wrong = f"hidden states of {join.target_size} elements, not {target.hidden_size}"
        elif target.vocab_size != join.vocab_size:
            wrong = f"a vocabulary of {join.vocab_size} tokens, not {target.vocab_size}"
        elif not all(0 <= tap <= num_layers for tap in taps):
            wrong = f"layers {list(taps)}, not {num_layers} layers"
        elif not join.own_embedding and target.hidden_size != self.spec.hidden_size:
            wrong = (
                f"an embedding of {self.spec.hidden_size} elements, having none (embed_tokens) of "
                f"its own, not {target.hidden_size}"
            )
        if wrong is not None:
            raise UnsupportedModelError(f"{self.path}: this head is for a model with {wrong}")


def load_eagle3_config(path: Path | str, load_format: HeadFormat = "auto") -> Eagle3Config:
    """Of a checkpoint's directory, in the authors' form or Speculators'.

    ``dummy`` weights need no tensors, and the embedding is the target's then. Raises
    UnsupportedModelError for what is no such head or is not built, ModelLoadError for a damaged
    one.
    """
    directory = Path(path)
    values = read_json(directory / "config.json", required=True)
    config = HfConfig(values, str(directory / "config.json"))
    stored = ["lm_head.weight"]
    if load_format != "dummy":
        stored = list(open_tensor_files(directory, load_format).names())
    held = {full_name(name) for name in stored}
    layers, names = read_eagle3(config, held), eagle3_names(held)
    quantised = stored_quantization(values, directory, names, layers.spec)
    return Eagle3Config(directory, load_format, layers, names, quantised)


def load_eagle3_head(
    config: Eagle3Config,
    target: Decoder,
    *,
    quantization: Quantization | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Eagle3Head:
    """Loads a head for ``target``, in its dtype.

    What it lacks is the target's, and so is an embedding that is equal to the target's.
    ``quantization`` is of its linear layers, if they are plain: see
    `parameters.module_quantization`. Raises as `Eagle3Config.check_target` does, and
    ModelLoadError.
    """
    config.check_target(target.spec)
    kernels, dtype, device = target.kernels, target.dtype, target.device
    source: WeightSource = RandomSource(seed)
    spec, names, target_ids = config.spec, config.names, torch.arange(config.spec.vocab_size)
    if config.load_format != "dummy":
        files = open_tensor_files(config.path, config.load_format)
        target_ids = _target_ids(config, files)
        if config.join.own_embedding and _has_embedding_of(target, files):
            spec = replace(spec, join=replace(config.join, own_embedding=False))
            names = replace(names, ignored=(*names.ignored, r"embed_tokens\.weight"))
        stored = config.stored_quantization
        reader = None if stored is None else stored.reader
        source = CheckpointSource(files, names, spec, config.path, reader)
    weights = build_weights(spec, source, kernels, dtype, device, progress, quantization)
    weights.borrowed = target.around()
    return Eagle3Head(
        spec,
        weights,
        kernels,
        dtype=dtype,
        device=device,
        max_model_len=target.max_model_len,
        taps=config.taps(len(target.spec.layers)),
        target_ids=target_ids.to(device),
    )


def _target_ids(config: Eagle3Config, files: TensorFiles) -> Tensor:
    """The token of the target's vocabulary that each of the head's is, [V] int64."""
    own_size, vocab_size = config.spec.vocab_size, config.join.vocab_size
    ids = torch.arange(own_size)
    name = _stored_name(files, _TARGET_IDS)
    if name is None and own_size == vocab_size:
        return ids
    if name is None:
        raise ModelLoadError(
            f"{config.path}: the checkpoint lacks {_TARGET_IDS}, which tells {own_size} tokens' "
            f"places among the target's {vocab_size}"
        )
    if files.shape(name) != (own_size,):
        raise ModelLoadError(
            f"{files.file(name)}: tensor {name} has shape {list(files.shape(name))}; the config "
            f"asks for {[own_size]}"
        )
    ids += files.read(name).to(torch.int64)
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ModelLoadError(
            f"{files.file(name)}: tensor {name} names tokens {int(ids.min())} to {int(ids.max())}, "
            f"and the target has {vocab_size}"
        )
    return ids


def _has_embedding_of(target: Decoder, files: TensorFiles) -> bool:
    """Whether the head's embedding is the target's, as far as the target's dtype tells."""
    theirs = target.around().tensors.get("embedding")
    name = _stored_name(files, "embed_tokens.weight")
    if theirs is None or name is None or files.shape(name) != tuple(theirs.shape):
        return False
    for start in range(0, theirs.shape[0], _ROWS_COMPARED):
        rows = slice(start, min(start + _ROWS_COMPARED, theirs.shape[0]))
        ours = files.read_rows(name, rows).to(theirs.device, theirs.dtype)
        if not torch.equal(ours, theirs[rows]):
            return False
    return True


def _stored_name(files: TensorFiles, full: str) -> str | None:
    return next((name for name in files.names() if full_name(name) == full), None)


class _AlreadyNormed(BoundNorm):
    """What enters the first layer was normed by parts, and is not part of the sum."""

    __slots__ = ()

    def add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return x, residual


class Eagle3Head(HeadDecoder):
    """`DraftHead` of one or a few layers. See `Decoder` for what else it does."""

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
        target_ids: Tensor,
    ) -> None:
        assert isinstance(spec.join, FusionSpec)
        self.taps = taps
        self._join = spec.join
        self._target_ids = target_ids
        super().__init__(
            spec, weights, kernels, dtype=dtype, device=device, max_model_len=max_model_len
        )

    def _bind(self, kernels: Kernels) -> None:
        super()._bind(kernels)
        outer, norm = self._weights.outer, self._join.norm
        names = [f"join.tap_norms.{tap}" for tap in range(self._join.num_taps)]
        if self._join.tap_norm == "all":
            names = ["join.taps_norm"]
        elif self._join.tap_norm is None:
            names = []
        self._tap_norms = [bind_norm(norm, outer.norms[name], kernels) for name in names]
        self._product = outer.linears["join.product"]
        self._of_embedding = bind_norm(norm, outer.norms["join.embedding_norm"], kernels)
        self._of_hidden = bind_norm(norm, outer.norms["join.hidden_norm"], kernels)

    def _block(self, index: int, weights: Weights) -> Block:
        block = super()._block(index, weights)
        assert isinstance(block, Block), "a head's layers have both halves"
        if index == 0:
            block._attention_norm = _AlreadyNormed()
        return block

    def _open(self, batch: ForwardBatch) -> tuple[Tensor, Tensor | None]:
        assert batch.hidden_states is not None, "a head is given the target's"
        embedding = self._of_embedding.norm(self._embed(batch))
        normed = self._of_hidden.norm(batch.hidden_states)
        residual = normed if self._join.norms_residual else batch.hidden_states
        return self.kernels.side_by_side((embedding, normed)), residual

    def take(self, states: Tensor) -> Tensor:
        """See `DraftHead`."""
        if self._join.tap_norm == "all":
            states = self._tap_norms[0].norm(states)
        elif self._join.tap_norm == "each":
            parts = states.split_with_sizes([self._join.target_size] * self._join.num_taps, dim=1)
            normed = [
                norm.norm(part.contiguous())
                for norm, part in zip(self._tap_norms, parts, strict=True)
            ]
            states = torch.cat(normed, dim=1)
        return self._product(states)

    def guess(self, batch: ForwardBatch, kv_caches: KVCache) -> tuple[Tensor, Tensor]:
        """See `DraftHead`."""
        token_ids, normed, found = self._guess(batch, kv_caches)
        return self._target_ids[token_ids], normed if self._join.feeds_normed else found
