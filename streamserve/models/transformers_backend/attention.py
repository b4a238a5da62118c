"""The functions that transformers calls where a model attends: ours, and the probe's.

A model that attends through `transformers.AttentionInterface` calls, in every layer, the function
that its config names. Under `PROBE` that function writes down what the layer asks for; under
`PAGED` it writes keys and values into our cache and calls our paged attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from streamserve.errors import UnsupportedModelError
from streamserve.models.batch import ForwardBatch, KVCache
from streamserve.models.spec import AttentionSpec
from streamserve_kernels import Kernels

PAGED = "streamserve"
PROBE = "streamserve_probe"

# What a layer may hand over that changes nothing here: dropout is for training, positions have
# turned the queries already, the cache is ours.
_IGNORED = {"cache", "dropout", "past_key_values", "position_embeddings", "position_ids"}
_OFF = {"output_attentions", "output_hidden_states", "output_router_logits", "use_cache"}
# Places that a mask is asked about, on either side of an edge.
_REACH = 4


class Step:
    """What the step at hand is made of; the model's forward has no way to pass it down."""

    __slots__ = ("batch", "kv_caches")

    def __init__(self) -> None:
        self.batch: ForwardBatch | None = None
        self.kv_caches: KVCache | None = None


class PagedAttention:
    """One layer's attention, bound to its place in the cache."""

    __slots__ = ("_index", "_kernels", "_spec", "_step")

    def __init__(self, spec: AttentionSpec, index: int, kernels: Kernels, step: Step) -> None:
        self._spec = spec
        self._index = index
        self._kernels = kernels
        self._step = step

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: object,
        s_aux: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """[1, heads, T, size] each -> [1, T, Hq, Dv]."""
        batch, caches = self._step.batch, self._step.kv_caches
        assert batch is not None, "the model was called past its step"
        assert caches is not None
        spec, kernels = self._spec, self._kernels
        key_cache, value_cache = caches[self._index]
        kernels.write_kv(
            _by_token(key), _by_token(value), key_cache, value_cache, batch.slot_mapping
        )
        groups = batch.prefix_groups
        if groups is not None and spec.window is not None:
            longest = batch.max_seq_len
            if longest is None or longest > spec.window:
                groups = None  # the window may cut the prefix, for each query at another place
        attended = kernels.paged_attention(
            _by_token(query),
            key_cache,
            value_cache,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            scale=spec.scale,
            window=spec.window,
            soft_cap=spec.soft_cap,
            sinks=s_aux,
            prefix_groups=groups,
            max_query_len=batch.max_query_len,
        )
        return attended[None], None


def _by_token(x: Tensor) -> Tensor:
    """[1, heads, T, size] -> [T, heads, size], contiguous: mostly it lies so already."""
    return x[0].transpose(0, 1).contiguous()


Attend = Callable[..., tuple[Tensor, None]]
"""Called as transformers calls an attention function."""


def bind(module: nn.Module, attend: Attend) -> None:
    """Makes ``module`` attend through ``attend``."""
    module._streamserve_attend = attend  # type: ignore[assignment]


def _attend(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, None]:
    attend: Any = module._streamserve_attend
    attended: tuple[Tensor, None] = attend(module, *args, **options)
    return attended


@dataclass(frozen=True, slots=True)
class CausalMask:
    """Stands for the mask that a model has made for it, while it is probed."""

    window: int | None


def _probe_mask(mask_function: Callable[..., Tensor], **options: Any) -> CausalMask:
    """Asks the mask itself what it hides: causal or a window behind each token, or refuses."""
    config = options["config"]
    window = getattr(config, "sliding_window", None)
    longest = getattr(config, "max_position_embeddings", None) or options["kv_length"]
    queries, keys = _places(window, longest)
    zero = torch.zeros_like(queries)
    visible = mask_function(zero, zero, queries, keys)
    causal = keys <= queries
    if torch.equal(visible, causal):
        return CausalMask(None)
    if window is not None and torch.equal(visible, causal & (queries - keys < window)):
        return CausalMask(window)
    raise UnsupportedModelError(
        "it needs an attention mask that is neither causal nor a window behind each token"
    )


def _places(window: int | None, longest: int) -> tuple[Tensor, Tensor]:
    """Pairs of a query and a key, at all distances by their powers of two, and around a window."""
    edges = [*range(-2, _REACH), *((window or 0) + i for i in range(-_REACH, _REACH))]
    distances = {*edges, *(2**i for i in range(longest.bit_length()))}
    places = (0, 1, _REACH, window or 0, longest // 2 + 1, longest - 1)
    pairs = {(place, place - d) for place in places for d in distances if 0 <= place - d < longest}
    queries, keys = zip(*sorted(pairs), strict=True)
    return torch.tensor(queries), torch.tensor(keys)


@dataclass(frozen=True, slots=True)
class Attending:
    """A module of a model, and what it asked for when it attended."""

    module: nn.Module
    spec: AttentionSpec


class Probe:
    """Collects what a model's layers ask for in one forward, in the order of the forward."""

    def __init__(self) -> None:
        self.found: list[Attending] = []

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: object,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        **others: object,
    ) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if isinstance(attention_mask, CausalMask):
            window = attention_mask.window
        elif attention_mask is None and causal:
            window = sliding_window
        else:
            raise UnsupportedModelError(
                "it attends to tokens that come later, or makes its own mask"
            )
        for name, given in others.items():
            if given is not None and name not in _IGNORED and not (name in _OFF and given is False):
                raise UnsupportedModelError(
                    f"its attention takes {name!r}, which paged attention has no notion of"
                )
        if any(attending.module is module for attending in self.found):
            raise UnsupportedModelError("one of its layers attends more than once in a forward")
        _, num_heads, _, size = query.shape
        _, num_kv_heads, num_keys, key_size = key.shape
        value_size = value.shape[3]
        if num_keys != query.shape[2] or key_size != size or num_heads % num_kv_heads:
            raise UnsupportedModelError(
                f"it attends with queries {list(query.shape)} to keys {list(key.shape)}"
            )
        spec = AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            query_key_head_size=size,
            value_head_size=value_size,
            scale=float(size**-0.5 if scaling is None else scaling),
            window=window,
            soft_cap=softcap,
            sinks=s_aux is not None,
        )
        self.found.append(Attending(module, spec))
        return query.new_empty(1, query.shape[2], num_heads, value_size), None


def register() -> None:
    """Tells transformers of both implementations; again is no harm."""
    for name in (PAGED, PROBE):
        AttentionInterface.register(name, _attend)
    AttentionMaskInterface.register(PROBE, _probe_mask)
