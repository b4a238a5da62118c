"""A plan as arrays: what every runner derives from it, whatever its device takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from streamserve.core.plan import ScheduledRequest, SchedulerOutput
from streamserve.runner.philox import uniforms
from streamserve.runner.request_rows import RequestRows


@dataclass(frozen=True, slots=True)
class StepRows:
    """Who is sampled in a step: L requests, in plan order."""

    request_ids: list[str]
    places: list[int]  # [L] where each stands in ``SchedulerOutput.scheduled``
    rows: NDArray[np.int64]  # [L] rows of the live requests
    output_positions: NDArray[np.int64]  # [L]
    ends: NDArray[np.int64]  # [L] the position that each sampled token will have


class PlanArrays:
    """T tokens of R requests, of which L are sampled.

    ``rows``, ``starts``, ``lengths``, ``ends`` are ``[R]``, ``query_start_loc`` is ``[R + 1]``
    int32, ``token_ids`` (pending ones negative), ``token_rows``, ``positions``, ``slots`` are
    ``[T]``, ``places`` and ``logits_indices`` ``[L]``.
    """

    def __init__(self, plan: SchedulerOutput, live: RequestRows) -> None:
        """Raises ValueError if the plan cannot be right."""
        scheduled = plan.scheduled
        self.rows = live.rows(scheduled)
        self.starts = np.array([s.start for s in scheduled], dtype=np.int64)
        self.lengths = np.array([len(s.token_ids) for s in scheduled], dtype=np.int64)
        self.ends = self.starts + self.lengths
        self.token_ids = np.array(
            list(chain.from_iterable([s.token_ids for s in scheduled])), dtype=np.int64
        )
        self.places = [i for i, s in enumerate(scheduled) if s.sample]
        live.check(scheduled, self.rows, self.lengths, self.ends)
        self.query_start_loc = np.zeros(len(scheduled) + 1, dtype=np.int32)
        np.cumsum(self.lengths, out=self.query_start_loc[1:], dtype=np.int32)
        if len(self.token_ids) == len(scheduled):
            self.token_rows, self.positions = self.rows, self.starts
        else:
            self.token_rows = np.repeat(self.rows, self.lengths)
            offsets = np.repeat(self.starts - self.query_start_loc[:-1], self.lengths)
            self.positions = np.arange(len(self.token_ids)) + offsets
        self.slots = live.slots(self.token_rows, self.positions)
        self._place_array = np.array(self.places, dtype=np.int64)
        self.logits_indices = self.query_start_loc[1:][self._place_array] - 1

    def sampled(self, scheduled: Sequence[ScheduledRequest]) -> StepRows:
        """The rows that are sampled; ``scheduled`` is the plan's."""
        return StepRows(
            request_ids=[scheduled[i].request_id for i in self.places],
            places=self.places,
            rows=self.rows[self._place_array],
            output_positions=np.array(
                [scheduled[i].output_position for i in self.places], np.int64
            ),
            ends=self.ends[self._place_array],
        )


def draws_for(live: RequestRows, step: StepRows) -> NDArray[np.float64]:
    """The uniform of each sampled row ``[L]``; zeros where nobody draws."""
    rows = step.rows
    if not live.temperature[rows].any():
        return np.zeros(len(rows))
    return uniforms(live.seed[rows], live.choice_index[rows], step.output_positions)
