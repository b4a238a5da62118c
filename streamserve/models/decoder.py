"""The one forward: every family's decoder, assembled from its spec when the weights are loaded.

All choices are made at assembly. What runs per layer and step is a fixed row of kernel calls on
bound weights, since a decode step of a small model is made of hundreds of them and each
microsecond of Python between two is paid by every token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from streamserve.models.adapters import AdapterTables
from streamserve.models.batch import ForwardBatch, KVCache
from streamserve.models.block import Block, Mixing, MlpBlock
from streamserve.models.latent import LatentAttention
from streamserve.models.layers import (
    Attention,
    BoundNorm,
    bind_norm,
)
from streamserve.models.mlp import bind_mlp
from streamserve.models.per_layer import PerLayerTable
from streamserve.models.recurrent import DeltaNet, ShortConv, StateSpace
from streamserve.models.rope import cos_sin_table
from streamserve.models.shared_cache import SharingAttention
from streamserve.models.side_by_side import SideBySide
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    DeltaNetSpec,
    RopeSpec,
    ShortConvSpec,
    SideBySideSpec,
    StateSpaceSpec,
)
from streamserve.models.weights import DecoderWeights, Weights
from streamserve_kernels import (
    Kernels,
    NotRecordableError,
    PackedLinear,
    QuantLinear,
    RecordedStep,
    WritingLinear,
)

logger = logging.getLogger(__name__)


class Decoder:
    """A decoder-only language model, ready to run. Stateless between calls: not tied to a thread.

    ``max_model_len`` bounds every position it is given. ``nbytes`` is what its weights take.
    Nothing in it needs a gradient; calling it under ``torch.inference_mode`` saves a little.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        weights: DecoderWeights,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        adapters: AdapterTables | None = None,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.max_model_len = max_model_len
        self.nbytes = weights.nbytes()
        self.adapters = adapters
        self._weights = weights
        # Gemma multiplies by what is left of it in its own dtype.
        self._embedding_scale: float = torch.tensor(spec.embedding_scale, dtype=dtype).item()
        self._cos_sin_tables: dict[RopeSpec, Tensor] = {}
        self._layers: Sequence[int] = range(len(spec.layers))  # those that `_blocks` are
        self._cache_places = spec.cache_places()
        self._taps: tuple[int, ...] = ()
        self._recorded: RecordedStep | None = None
        self._recorded_adapted: RecordedStep | None = None  # for steps with adapters
        self._recorded_caches: KVCache | None = None
        self._bind(kernels)

    def _bind(self, kernels: Kernels) -> None:
        """Makes every part of the forward call the functions of ``kernels``."""
        spec, outer, borrowed = self.spec, self._weights.outer, self._weights.borrowed
        self.kernels = kernels
        self._blocks = self._assemble(self._weights.layers)
        # The same once more, for steps in which rows have adapters.
        self._adapted_blocks: list[Block | MlpBlock] = []
        if self.adapters is not None:
            adapted = self.adapters.adapted(self._weights.layers, kernels)
            self._adapted_blocks = self._assemble(adapted)
        linears = {**borrowed.linears, **outer.linears}
        tensors = {**borrowed.tensors, **outer.tensors}
        self._head = linears["head"]
        self._embedding: Tensor | QuantLinear
        if "embedding" in tensors:
            self._embedding = tensors["embedding"]
        else:
            rows = linears.get("embedding", self._head)
            assert isinstance(rows, QuantLinear), "a quantised tied head is the embedding too"
            self._embedding = rows
        self._per_layer = None if spec.per_layer is None else PerLayerTable(spec, outer, kernels)
        self._position_embedding = outer.tensors.get("position_embedding")
        self._embedding_norm = (
            None
            if spec.embedding_norm is None
            else bind_norm(spec.embedding_norm, outer.norms["embedding_norm"], kernels)
        )
        self.final_norm = (
            BoundNorm()
            if spec.final_norm is None
            else bind_norm(spec.final_norm, outer.norm("final_norm", spec.final_norm), kernels)
        )

    def _assemble(self, layers: list[Weights]) -> list[Block | MlpBlock]:
        return [self._block(index, weights) for index, weights in enumerate(layers)]

    def _block(self, index: int, weights: Weights) -> Block | MlpBlock:
        layer, kernels = self.spec.layers[index], self.kernels
        mlp = None if layer.mlp is None else bind_mlp(layer.mlp, weights, kernels)
        if layer.attention is None:
            assert mlp is not None, "a layer is two halves, or one of them"
            return MlpBlock(layer, weights, kernels, mlp)
        attention: Mixing
        if isinstance(layer.attention, DeltaNetSpec):
            attention = DeltaNet(layer.attention, weights, kernels)
        elif isinstance(layer.attention, StateSpaceSpec):
            attention = StateSpace(layer.attention, weights, kernels)
        elif isinstance(layer.attention, ShortConvSpec):
            attention = ShortConv(layer.attention, weights, kernels)
        elif isinstance(layer.attention, SideBySideSpec):
            attention = SideBySide(
                layer.attention,
                self._attention(layer.attention.attention, weights),
                StateSpace(layer.attention.space, weights, kernels),
            )
        else:
            attention = self._attention(layer.attention, weights)
        return Block(layer, weights, kernels, attention, mlp)

    def _attention(
        self, spec: AttentionSpec, weights: Weights, **options: Any
    ) -> Attention | LatentAttention:
        kernels, cos_sin = self.kernels, self._cos_sin(spec.rope)
        if spec.latent is not None:
            return LatentAttention(spec, weights, kernels, cos_sin)
        limits = (self.device, cos_sin, self.max_model_len)
        kind = Attention if spec.shares_cache_of is None else SharingAttention
        return kind(spec, weights, kernels, *limits, **options)

    def linears(self) -> Iterator[PackedLinear]:
        """Every product of the forward, layer by layer, experts one by one; the head last."""
        for weights in self._weights.layers:
            yield from weights.linears.values()
            yield from weights.expert_gate_up
            yield from weights.expert_down
        yield self._head

    def around(self) -> Weights:
        """The embedding and the head, for another decoder to borrow."""
        around = Weights(linears={"head": self._head})
        if isinstance(self._embedding, Tensor):
            around.tensors["embedding"] = self._embedding
        else:
            around.linears["embedding"] = self._embedding
        return around

    def _cos_sin(self, rope: RopeSpec | None) -> Tensor | None:
        tables = self._cos_sin_tables
        if rope is None:
            return None
        if rope not in tables:
            tables[rope] = cos_sin_table(rope, self.max_model_len, self.device)
        return tables[rope]

    def warm_up(self, block_size: int = 16) -> None:
        """Compiles the kernels that this model calls, so that no request waits for a compiler."""
        for head_size, value_head_size in self.spec.head_sizes():
            self.kernels.warm_up(self.dtype, head_size, value_head_size, block_size)

    def record(self, kv_caches: KVCache, *, max_tokens: int, max_logits: int) -> int:
        """Writes the forward down, where the kernels can, so that a step is one call.

        Later steps on the same ``kv_caches``, of up to the number of tokens that this returns (0:
        nothing was recorded), run what was written down. Larger ones, and those that need more
        logits, run function by function.
        """
        recorded = self._record(kv_caches, max_tokens, max_logits, adapted=False)
        if recorded is None:
            return 0
        self._recorded, self._recorded_caches = recorded, kv_caches
        if self.adapters is not None:
            self._recorded_adapted = self._record(kv_caches, max_tokens, max_logits, adapted=True)
        return recorded.max_tokens

    def _record(
        self, kv_caches: KVCache, max_tokens: int, max_logits: int, *, adapted: bool
    ) -> RecordedStep | None:
        recorder = self.kernels.recorder(max_tokens, max_logits)
        if recorder is None:
            return None
        if self.spec.join is not None:
            recorder.give_hidden_states(self.spec.hidden_size)
        twin = copy(self)
        twin._bind(cast(Kernels, recorder))
        if adapted:
            twin._blocks = twin._adapted_blocks
        try:
            hidden_states, found, tapped = twin._run(recorder.batch, kv_caches, self._taps)
            if self.spec.join is not None:
                tapped = [found]  # what some heads go on from
            return recorder.finish(
                hidden_states,
                self._head,
                self.spec.logit_scale,
                self.spec.logit_soft_cap,
                tapped,
            )
        except NotRecordableError as error:
            logger.info("the forward runs function by function: it has %s", error)
            return None

    def _recorded_for(self, batch: ForwardBatch, kv_caches: KVCache) -> RecordedStep | None:
        recorded = self._recorded if batch.adapters is None else self._recorded_adapted
        if recorded is None or self._recorded_caches is not kv_caches:
            return None
        fits = (
            batch.input_ids.shape[0] <= recorded.max_tokens
            and batch.logits_indices.shape[0] <= recorded.max_logits
        )
        return recorded if fits else None

    def forward(
        self, batch: ForwardBatch, kv_caches: KVCache, logits: Tensor | None = None
    ) -> Tensor:
        """Runs one step and writes its keys and values into ``kv_caches``.

        Returns logits [L, V] float32 for the rows ``batch.logits_indices``; L may be 0. They are
        written into ``logits`` if that is given: see `compute_logits`. A recorded step's are
        overwritten by the next.
        """
        recorded = self._recorded_for(batch, kv_caches)
        if recorded is not None:
            found = recorded.logits(batch)
            return found if logits is None else logits.copy_(found)
        return self.compute_logits(self.hidden_states(batch, kv_caches), logits)

    def greedy(self, batch: ForwardBatch, kv_caches: KVCache) -> Tensor | None:
        """As `forward`, but gives the likeliest token [L] int64 of each row, the first of equals.

        A recorded step then does not even store the logits. None, and nothing has run, where the
        step was not recorded: call `forward`.
        """
        recorded = self._recorded_for(batch, kv_caches)
        return None if recorded is None else recorded.greedy(batch)

    def forward_with_states(self, batch: ForwardBatch, kv_caches: KVCache) -> tuple[Tensor, Tensor]:
        """As `forward`, with the final normed hidden states [L, H] of the same rows."""
        recorded = self._recorded_for(batch, kv_caches)
        if recorded is not None:
            logits = recorded.logits(batch)
            return logits, recorded.hidden_states(logits.shape[0])
        hidden_states = self.hidden_states(batch, kv_caches)
        return self.compute_logits(hidden_states), hidden_states

    def tap(self, layers: tuple[int, ...]) -> None:
        """Has steps give what enters these layers, for a draft head.

        What would enter one more is what the last one leaves. To be said before `record`. Raises
        ValueError for layers that there are not.
        """
        last = len(self.spec.layers)
        if not all(0 <= layer <= last for layer in layers):
            raise ValueError(f"taps {layers} must be between 0 and {last}, the number of layers")
        self._taps = layers

    def forward_with_all_states(
        self, batch: ForwardBatch, kv_caches: KVCache
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with the sums at the taps, of all rows: [T, taps * H], not normed.

        A recorded step's are overwritten by the next.
        """
        recorded = self._recorded_for(batch, kv_caches)
        if recorded is not None:
            logits = recorded.logits(batch)
            return logits, _joined(recorded.tapped(batch.input_ids.shape[0]))
        states, _, tapped = self._run(batch, kv_caches, self._taps)
        return self.compute_logits(states), _joined(tapped)

    def greedy_with_all_states(
        self, batch: ForwardBatch, kv_caches: KVCache
    ) -> tuple[Tensor, Tensor] | None:
        """As `greedy`, with what `forward_with_all_states` gives beside the logits."""
        recorded = self._recorded_for(batch, kv_caches)
        if recorded is None:
            return None
        token_ids = recorded.greedy(batch)
        return token_ids, _joined(recorded.tapped(batch.input_ids.shape[0]))

    def all_states(self, batch: ForwardBatch, kv_caches: KVCache) -> tuple[Tensor, Tensor]:
        """Runs a step: final normed hidden states [T, H] of all rows, whichever need logits.

        And, with taps, what `forward_with_all_states` gives beside the logits.
        """
        every_row = torch.arange(batch.input_ids.shape[0], device=self.device)
        all_rows = replace(batch, logits_indices=every_row)
        states, _, tapped = self._run(all_rows, kv_caches, self._taps)
        return states, _joined(tapped) if tapped else states

    def hidden_states(self, batch: ForwardBatch, kv_caches: KVCache) -> Tensor:
        """As `forward`, but returns the final normed hidden states [L, H] of the same rows."""
        return self._run(batch, kv_caches, ())[0]

    def _run(
        self, batch: ForwardBatch, kv_caches: KVCache, taps: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns the final hidden states [L, H], normed and not, and sums [T, H] at the taps."""
        x, residual = self._open(batch)
        parts = None if self._per_layer is None else self._parts(self._per_layer, batch, x)
        tapped: dict[int, Tensor] = {}
        rows = batch.logits_indices
        # Strictly increasing rows that are as many as the tokens are all of them.
        wanted = None if rows.shape[0] == batch.input_ids.shape[0] else rows
        blocks = self._blocks
        if batch.adapters is not None and self.adapters is not None:
            self.adapters.current.adapters = batch.adapters
            blocks = self._adapted_blocks
        if rows.shape[0] == 0 and not taps:
            # Nobody asks for what the others find, and they leave nothing behind.
            blocks = blocks[: self._num_writing()]
        num_blocks = len(blocks)
        last, last_rows = num_blocks - 1, None if num_blocks in taps else wanted
        for index, block in enumerate(blocks):
            if index in taps:
                tapped[index] = x if residual is None else x + residual
            layer = self._layers[index]
            pairs = kv_caches[self._cache_places[layer]]
            x, residual = block.forward(
                x,
                residual,
                batch,
                pairs[0] if len(pairs) == 1 else tuple(chain(*pairs)),
                last_rows if index == last else None,
                None if parts is None else parts[layer],
            )
        if num_blocks in taps:
            tapped[num_blocks] = x if residual is None else x + residual
            if wanted is not None:
                x = x.index_select(0, wanted)
                residual = None if residual is None else residual.index_select(0, wanted)
        found = [tapped[index] for index in taps]
        if rows.shape[0] == 0:
            return x[:0], x[:0], found
        if residual is None:
            return self.final_norm.norm(x), x, found
        return (*self.final_norm.add_norm(x, residual), found)

    def _num_writing(self) -> int:
        """Blocks up to the last one that has a cache of its own."""
        places = [self._cache_places[layer] for layer in self._layers]
        return max(index for index, place in enumerate(places) if place not in places[:index]) + 1

    def one_of_each_layer(self) -> Decoder:
        """A thin copy that shares the weights: the first layer of each kind is left, and the last.

        (The last is fed other numbers of rows.) It meets every shape that the whole decoder meets,
        in a fraction of the time: for warm-up. It takes the whole decoder's caches.
        """
        first = {layer: index for index, layer in reversed(list(enumerate(self.spec.layers)))}
        thin = copy(self)
        thin._recorded = None
        thin._taps = (0,) * len(self._taps)
        layers = sorted({*first.values(), len(self._blocks) - 1})
        thin._layers = layers
        thin._blocks = [self._blocks[index] for index in layers]
        if self.adapters is not None:
            thin._adapted_blocks = [self._adapted_blocks[index] for index in layers]
        return thin

    @property
    def logits_dtype(self) -> torch.dtype:
        """The smallest dtype that holds the logits as they are: the head's, or float32."""
        is_plain = self.spec.logit_scale == 1.0 and self.spec.logit_soft_cap is None
        return self.dtype if is_plain else torch.float32

    def compute_logits(self, hidden_states: Tensor, out: Tensor | None = None) -> Tensor:
        """Normed hidden states [L, H] -> logits [L, V] float32.

        Or in ``out`` if that is given, of float32 or of ``logits_dtype``.
        """
        if out is None:
            shape = (hidden_states.shape[0], self.spec.vocab_size)
            out = hidden_states.new_empty(shape, dtype=torch.float32)
        if hidden_states.shape[0] == 0:
            return out
        if out.dtype == hidden_states.dtype and isinstance(self._head, WritingLinear):
            self._head.write(hidden_states, out)
        else:
            out.copy_(self._head(hidden_states))
        if self.spec.logit_scale != 1.0:
            out *= self.spec.logit_scale
        cap = self.spec.logit_soft_cap
        if cap is not None:
            out.div_(cap).tanh_().mul_(cap)
        return out

    def _open(self, batch: ForwardBatch) -> tuple[Tensor, Tensor | None]:
        """What enters the first layer: see `Block`."""
        return self._embed(batch), None

    def _embed(self, batch: ForwardBatch) -> Tensor:
        x = self._look_up(batch.input_ids, self._embedding)
        if self._embedding_scale != 1.0:
            x = x * self._embedding_scale
        if self._position_embedding is not None:
            positions = batch.positions
            if self.spec.position_offset:
                positions = positions + self.spec.position_offset
            x = x + self.kernels.embedding(positions, self._position_embedding)
        if self._embedding_norm is not None:
            x = self._embedding_norm.norm(x)
        return x

    def _parts(self, per_layer: PerLayerTable, batch: ForwardBatch, x: Tensor) -> Sequence[Tensor]:
        """Each layer's own part [T, P] of the tokens' embeddings, x."""
        return per_layer.parts(self._look_up(batch.input_ids, per_layer.table), x)

    def _look_up(self, input_ids: Tensor, table: Tensor | QuantLinear) -> Tensor:
        return self.kernels.embedding(input_ids, table)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
