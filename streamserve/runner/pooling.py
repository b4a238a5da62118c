"""Vectors of prompts, from the hidden states of their rows.

Only steps with a prompt whose request asked for one do this work. The mean of a prompt that comes
in several steps is summed up here, in float32; one that is preempted begins anew.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from streamserve.core.plan import NewRequest, SchedulerOutput
from streamserve.core.pooling import Pooling


class PoolRows(NamedTuple):
    """Rows of a step that a vector is made of."""

    request_id: str
    pooling: Pooling
    place: int  # in ``SchedulerOutput.scheduled``
    first_row: int  # of the step's tokens
    num_rows: int
    start: int  # position of the first in its prompt
    is_last: bool  # the prompt ends with them


class Pools:
    """The live requests that want their prompt pooled. One device thread."""

    def __init__(self) -> None:
        self.requests: dict[str, NewRequest] = {}
        self._sums: dict[str, Tensor] = {}  # [H] float32, by request id

    def apply(self, plan: SchedulerOutput) -> None:
        """Learn who comes and who goes."""
        if self.requests:
            for request_id in plan.released_ids:
                self.requests.pop(request_id, None)
                self._sums.pop(request_id, None)
        for request in plan.new_requests:
            if request.sampling_params.pooling is not None:
                self.requests[request.request_id] = request

    def rows_of(self, plan: SchedulerOutput) -> list[PoolRows]:
        """The rows of a step that belong to vectors, rising."""
        found: list[PoolRows] = []
        row = 0
        for place, scheduled in enumerate(plan.scheduled):
            first_row, row = row, row + len(scheduled.token_ids)
            request = self.requests.get(scheduled.request_id)
            if request is None:
                continue
            pooling = request.sampling_params.pooling
            assert pooling is not None
            is_last = bool(scheduled.sample)
            if is_last or pooling.needs_every_row:
                found.append(
                    PoolRows(
                        scheduled.request_id,
                        pooling,
                        place,
                        first_row,
                        row - first_row,
                        scheduled.start,
                        is_last,
                    )
                )
        return found

    def of_all_rows(self, rows: list[PoolRows], hidden_states: Tensor) -> dict[str, Tensor]:
        """The vectors ``[D]`` float32 that are complete; ``hidden_states`` ``[T, H]``."""
        found: dict[str, Tensor] = {}
        for part in rows:
            end = part.first_row + part.num_rows
            if part.pooling.needs_every_row:
                vector = self._mean(part, hidden_states[part.first_row : end])
            else:
                vector = hidden_states[end - 1]
            if vector is not None:
                found[part.request_id] = _finished(vector, part.pooling)
        return found

    def _mean(self, part: PoolRows, hidden_states: Tensor) -> Tensor | None:
        total = hidden_states.sum(0, dtype=torch.float32)
        before = self._sums.pop(part.request_id, None)
        # There is none behind a step that failed: what comes of this one counts for nothing.
        if part.start and before is not None:
            total += before
        if part.is_last:
            return total / (part.start + part.num_rows)
        self._sums[part.request_id] = total
        return None


def of_last_rows(
    rows: list[PoolRows], places: list[int], hidden_states: Tensor
) -> dict[str, Tensor]:
    """As ``Pools.of_all_rows`` where each is of one row: ``hidden_states`` ``[L, H]``.

    ``places``, rising, are those of the rows in ``SchedulerOutput.scheduled``.
    """
    return {
        part.request_id: _finished(hidden_states[places.index(part.place)], part.pooling)
        for part in rows
    }


@dataclass(frozen=True, slots=True)
class Pooled:
    """Vectors: on the device, or on their way from it."""

    vectors: Mapping[str, Tensor]

    def by_request(self) -> Mapping[str, array[float]]:
        """As a step's output has them; the tensors must be on the host by now."""
        return {
            request_id: array("f", vector.numpy().tobytes())
            for request_id, vector in self.vectors.items()
        }


def _finished(vector: Tensor, pooling: Pooling) -> Tensor:
    vector = vector.to(torch.float32)[: pooling.dimensions]
    if pooling.normalize:
        return torch.nn.functional.normalize(vector, dim=0)
    return vector.clone()  # not the states, which the next step may overwrite
