"""A plan as arrays: what every runner derives from it, whatever its device takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from streamserve.core.plan import ScheduledRequest, SchedulerOutput
from streamserve.runner.philox import uniforms
from streamserve.runner.request_rows import Int64Array, RequestRows

NO_DRAFT = -1


@dataclass(frozen=True, slots=True)
class StepRows:
    """Who is sampled in a step: L samples, in plan order; with drafts, a request has several.

    ``drafts`` and ``num_before`` are there if any request has some: what each sample must be for
    the next one of the same request to count, ``NO_DRAFT`` for its last; and how many samples of
    the same request stand before it.
    """

    request_ids: list[str]
    places: list[int]  # [L] where each stands in ``SchedulerOutput.scheduled``
    rows: NDArray[np.int64]  # [L] rows of the live requests
    output_positions: NDArray[np.int64]  # [L]
    ends: NDArray[np.int64]  # [L] the position that each sampled token will have
    drafts: NDArray[np.int64] | None = None  # [L]
    num_before: NDArray[np.int64] | None = None  # [L]

    def keep(
        self, token_ids: NDArray[np.int64]
    ) -> tuple[StepRows, NDArray[np.int64], slice | NDArray[np.int64]]:
        """The samples that count, those behind drafts that were right; their ids of the sampled
        ``token_ids`` ``[L]``; and which of the rows they are.
        """
        if self.drafts is None:
            return self, token_ids, slice(None)
        kept, counts = [], True
        for i, (draft, token_id) in enumerate(
            zip(self.drafts.tolist(), token_ids.tolist(), strict=True)
        ):
            if counts:
                kept.append(i)
            counts = draft == NO_DRAFT or (counts and draft == token_id)
        which = np.array(kept, dtype=np.int64)
        return self.only(which), token_ids[which], which

    def only(self, kept: NDArray[np.int64]) -> StepRows:
        """The samples that count; of drafts they know nothing any more."""
        chosen = kept.tolist()
        return StepRows(
            [self.request_ids[i] for i in chosen],
            [self.places[i] for i in chosen],
            self.rows[kept],
            self.output_positions[kept],
            self.ends[kept],
        )

    def without(self, places: Collection[int]) -> tuple[StepRows, NDArray[np.int64]]:
        """The samples but for those at ``places``, and which of the rows they are."""
        kept = np.array([i for i, p in enumerate(self.places) if p not in places], np.int64)
        rows = self.only(kept)
        if self.drafts is not None and self.num_before is not None:
            rows = replace(rows, drafts=self.drafts[kept], num_before=self.num_before[kept])
        return rows, kept

    def index_of(self, row: int) -> int:
        """Which of its request's samples it is."""
        return 0 if self.num_before is None else int(self.num_before[row])

    def drafts_before(self, row: int) -> list[int]:
        """The drafts of the same request that stand before a sample."""
        if self.drafts is None or self.num_before is None:
            return []
        before: list[int] = self.drafts[row - self.num_before[row] : row].tolist()
        return before


class PlanArrays:
    """T tokens of R requests, of which L are sampled: the last of a request, or its last few.

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
        self._num_behind: NDArray[np.int64] | None = None  # [L] tokens that a request has behind it
        if any(s.sample > 1 for s in scheduled):
            self.places = [i for i, s in enumerate(scheduled) for _ in range(s.sample)]
            self._num_behind = np.array(
                [behind for s in scheduled for behind in range(s.sample - 1, -1, -1)], np.int64
            )
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
        if self._num_behind is not None:
            self.logits_indices = self.logits_indices - self._num_behind.astype(np.int32)

    def saves(self, plan: SchedulerOutput) -> tuple[Int64Array, NDArray[np.int32]]:
        """The tokens behind which a state is saved, and the slots that take them."""
        tokens = [
            self.query_start_loc[save.place] + save.position - 1 - plan.scheduled[save.place].start
            for save in plan.state_saves
        ]
        slots = [save.slot for save in plan.state_saves]
        return np.array(tokens, dtype=np.int64), np.array(slots, dtype=np.int32)

    def sampled(self, scheduled: Sequence[ScheduledRequest]) -> StepRows:
        """The rows that are sampled; ``scheduled`` is the plan's."""
        rows = self._last_of_each(scheduled)
        behind = self._num_behind
        if behind is None:
            return rows
        drafts = np.full(len(behind), NO_DRAFT, dtype=np.int64)
        drafts[behind > 0] = self.token_ids[self.logits_indices[behind > 0] + 1]
        num_before = np.array([scheduled[i].sample - 1 for i in self.places]) - behind
        return replace(
            rows,
            output_positions=rows.output_positions + num_before,
            ends=rows.ends - behind,
            drafts=drafts,
            num_before=num_before,
        )

    def _last_of_each(self, scheduled: Sequence[ScheduledRequest]) -> StepRows:
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
