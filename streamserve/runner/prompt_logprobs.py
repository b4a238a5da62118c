"""Logprobs of prompts: every row of a prompt gets logits, a few rows at a time.

Only steps with a prompt whose request asked for them do this work. The rows' hidden states are all
there at once; their logits, which are as wide as the vocabulary, never are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from streamserve.core.plan import NewRequest, PromptLogprobs, SchedulerOutput, TokenLogprobs
from streamserve.models.batch import ForwardBatch, KVCache
from streamserve_kernels.uploads import upload

_LOGITS_BYTES = 32 * 2**20  # of the rows at hand; their exponentials take as much for a moment
_MIN_LOGPROB = -9999.0  # as the sampler's


class PromptModel(Protocol):
    """What a ``streamserve.models.Decoder`` offers for this."""

    def hidden_states(self, batch: ForwardBatch, kv_caches: KVCache) -> Tensor:
        """Final normed hidden states ``[L, H]``."""

    def compute_logits(self, hidden_states: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits ``[L, V]`` float32, or in ``out``."""


class PromptRows(NamedTuple):
    """Rows of a step whose logits are those of a prompt's next tokens."""

    request_id: str
    first_row: int  # of the step's tokens
    position: int  # of the first target in its request
    targets: list[int]  # the prompt's own tokens, one for each row
    num_logprobs: int


class PromptsWanted:
    """The live requests that ask for their prompt's logprobs. One device thread."""

    def __init__(self) -> None:
        self._requests: dict[str, NewRequest] = {}

    def apply(self, plan: SchedulerOutput) -> None:
        """Learn who comes and who goes."""
        for request_id in plan.released_ids:
            self._requests.pop(request_id, None)
        for request in plan.new_requests:
            if request.sampling_params.prompt_logprobs is not None:
                self._requests[request.request_id] = request

    def rows_of(self, plan: SchedulerOutput) -> list[PromptRows]:
        """What the step must find; nearly always nothing."""
        if not self._requests:
            return []
        found: list[PromptRows] = []
        row = 0
        for scheduled in plan.scheduled:
            first_row, row = row, row + len(scheduled.token_ids)
            request = self._requests.get(scheduled.request_id)
            if request is None:
                continue
            first = scheduled.start + 1
            end = min(first + len(scheduled.token_ids), request.num_prompt_tokens)
            count = request.sampling_params.prompt_logprobs
            if first < end and count is not None:
                targets = request.token_ids[first:end]
                found.append(PromptRows(request.request_id, first_row, first, targets, count))
        return found


@dataclass(frozen=True, slots=True)
class FoundLogprobs:
    """Of N rows: on the device, or on their way from it. ``top`` and ``top_ids`` are ``[N, k]``."""

    rows: list[PromptRows]
    chosen: Tensor  # [N] float32
    ranks: Tensor  # [N] int64
    top: Tensor
    top_ids: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of the fields."""
        return self.chosen, self.ranks, self.top, self.top_ids

    def by_request(self) -> Mapping[str, PromptLogprobs]:
        """As a step's output has them; the tensors must be on the host by now."""
        chosen, ranks, top, top_ids = (part.tolist() for part in self.tensors())
        found: dict[str, PromptLogprobs] = {}
        row = 0
        for request_id, _, position, targets, count in self.rows:
            entries = [
                TokenLogprobs(
                    token_id,
                    chosen[i],
                    tuple(zip(top_ids[i][:count], top[i][:count], strict=True)),
                    ranks[i],
                )
                for i, token_id in enumerate(targets, start=row)
            ]
            row += len(targets)
            found[request_id] = PromptLogprobs(position, entries)
        return found


def all_hidden_states(model: PromptModel, batch: ForwardBatch, kv_caches: KVCache) -> Tensor:
    """Runs a step and gives the hidden states ``[T, H]`` of all of its rows."""
    every_row = torch.arange(batch.input_ids.shape[0], device=batch.input_ids.device)
    return model.hidden_states(replace(batch, logits_indices=every_row), kv_caches)


def find_logprobs(
    model: PromptModel,
    hidden_states: Tensor,
    rows: list[PromptRows],
    vocab_size: int,
    sizes: Sequence[int],
) -> FoundLogprobs:
    """The prompt tokens' logprobs and the likeliest alternatives; ``hidden_states`` ``[T, H]``.

    ``sizes``, rising, are the numbers of rows that the head is given: those that it has met, since
    it may compile something for each. The last rows are padded to one of them.
    """
    device = hidden_states.device
    places = chain.from_iterable(range(r.first_row, r.first_row + len(r.targets)) for r in rows)
    indices = upload(torch.tensor(list(places)), device)
    targets = upload(torch.tensor(list(chain.from_iterable(r.targets for r in rows))), device)
    num_top = min(max(r.num_logprobs for r in rows), vocab_size)
    chunk = max([size for size in sizes if 4 * size * vocab_size <= _LOGITS_BYTES] or sizes[:1])
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for start in range(0, len(indices), chunk):
        here = indices[start : start + chunk]
        count = len(here)
        size = next(size for size in sizes if size >= count)
        padded = torch.cat((here, here[-1:].expand(size - count)))
        logits = model.compute_logits(hidden_states.index_select(0, padded))[:count]
        parts.append(_of_logits(logits, targets[start : start + chunk], num_top))
    chosen, ranks, top, top_ids = (torch.cat(part) for part in zip(*parts, strict=True))
    return FoundLogprobs(rows, chosen, ranks, top, top_ids)


def _of_logits(
    logits: Tensor, targets: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [C, V], targets [C] -> chosen [C], ranks [C], top [C, k], top ids [C, k]."""
    logits = logits.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    normaliser = logits.logsumexp(1, keepdim=True)
    chosen = logits.gather(1, targets[:, None])
    ranks = (logits > chosen).sum(1) + 1
    top, top_ids = logits.topk(num_top, dim=1)

    def finite(values: Tensor) -> Tensor:
        return (values - normaliser).nan_to_num_(nan=0.0).clamp_(_MIN_LOGPROB, 0.0)

    return finite(chosen)[:, 0], ranks, finite(top), top_ids
