"""What is remembered of live requests beside a device, and one step's inputs made from it.

As `streamserve.runner.input_batch`, with two differences. The ids that a step samples stay on the
device: where the next step computes such a token, its id is written as ``-1 - row``, and the device
puts in what ``row`` drew last. And everything that sampling needs travels with the step.

(Of a request with drafts nothing stays: the next step that has it is made when the host knows how
many of its samples count.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from streamserve.core.plan import PENDING_TOKEN, NewRequest, PrefixGroup, SchedulerOutput
from streamserve.runner.cuda.arena import HostViews, StepArena, StepInputs
from streamserve.runner.cuda.step_key import StepKey, StepLadder
from streamserve.runner.cuda.timeline import Mark, Timeline
from streamserve.runner.logits_edits import LogitsEdits
from streamserve.runner.plan_arrays import NO_DRAFT, PlanArrays, StepRows, draws_for
from streamserve.runner.request_rows import RequestRows
from streamserve_kernels.adapters import group_rows

_NO_PENALTIES = {
    "count_rows": -1,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step whose inputs are on their way to the device."""

    key: StepKey
    inputs: StepInputs
    rows: StepRows
    logits_rows: NDArray[np.int64]  # [L] which of the rows with logits belongs to each of `rows`
    is_greedy: bool  # the arg-max is all that anybody asks for
    started: Mark  # where the device begins with it

    def without(self, places: Collection[int]) -> DeviceStep:
        """The step as if nothing were drawn at ``places`` of its plan."""
        if not places:
            return self
        rows, kept = self.rows.without(places)
        return replace(self, rows=rows, logits_rows=self.logits_rows[kept])


class DeviceInputBatch:
    """Live requests and the arena of their steps. One device thread."""

    def __init__(
        self,
        ladder: StepLadder,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
        timeline: Timeline,
        keeps_states: bool = False,
    ) -> None:
        self._ladder = ladder
        self._keeps_states = keeps_states
        self._vocab_size = vocab_size
        self._timeline = timeline
        # Two steps in flight: a leaving request may overlap with the one that takes its seat.
        self.rows = RequestRows(
            num_rows=2 * max_num_seqs,
            max_rows=2 * max_num_seqs,
            max_model_len=max_model_len,
            block_size=block_size,
            vocab_size=vocab_size,
        )
        self.edits: dict[int, LogitsEdits] = {}  # by row, where a request edits its logits
        self.arena = StepArena(
            ladder.largest, self.rows.max_blocks, device, timeline, keeps_states=keeps_states
        )
        self._has_drawn = np.zeros(self.rows.num_rows, dtype=np.bool_)

    @property
    def unused_row(self) -> int:
        """The row that draws of nobody go to, behind those of the live."""
        return self.rows.num_rows

    @property
    def logits_sizes(self) -> Sequence[int]:
        """Numbers of rows, rising, for which the logits were computed at warm-up."""
        return self._ladder.mixed_seqs

    def apply(self, plan: SchedulerOutput) -> list[tuple[int, NewRequest]]:
        """Takes over what the plan says about requests; raises ValueError if it cannot be so.

        Returns the new requests whose edits read their history, with their rows.
        """
        for request_id in plan.released_ids:
            self._remove(request_id)
        with_history = []
        for request in plan.new_requests:
            self._remove(request.request_id)
            row = self.rows.add(request)
            self._has_drawn[row] = False
            if LogitsEdits.are_needed(request):
                self.edits[row] = LogitsEdits(request, self._vocab_size, keeps_history=False)
                if request.sampling_params.has_penalties or self.edits[row].bad_sequences:
                    with_history.append((row, request))
        self.rows.move_states(plan.state_moves)
        for scheduled in plan.scheduled:
            if scheduled.new_block_ids:
                self.rows.append_blocks(scheduled.request_id, scheduled.new_block_ids)
        return with_history

    def build(self, plan: SchedulerOutput, count_rows: dict[int, int]) -> DeviceStep:
        """Writes the inputs of a plan that was applied and schedules something; queues their copy.

        ``count_rows``: rows of the penalties' table by rows of requests. Raises ValueError if the
        plan cannot be right.
        """
        step = PlanArrays(plan, self.rows)
        pending = step.token_ids == PENDING_TOKEN
        if pending.any():
            self._resolve_pending(step, pending)
        rows = step.sampled(plan.scheduled)
        num_tokens, num_seqs = len(step.token_ids), len(step.rows)
        key = self._ladder.key(
            num_tokens,
            num_seqs,
            num_sampled=len(rows.places),
            has_groups=bool(plan.prefix_groups),
            has_adapters=self.rows.have_adapters(step.rows),
        )
        if rows.drafts is not None and (longest := int(step.lengths.max())) > key.max_query_len:
            raise ValueError(f"a request has {longest - 1} drafts, of {key.max_query_len - 1}")
        views = self.arena.open(key)
        self._write_tokens(views, step, key)
        logits_rows = self._write_sampled(views, step, rows, key, count_rows)
        if key.has_groups:
            _write_groups(views, plan.prefix_groups)
        if key.num_adapters:
            _write_adapters(views, self.rows.adapter[step.token_rows], key)
        if self._keeps_states:
            _write_states(views, self.rows.state_slot[step.rows], *step.saves(plan))
        started = self._timeline.mark()
        return DeviceStep(
            key=key,
            started=started,
            inputs=self.arena.upload(key, num_seqs),
            rows=rows,
            logits_rows=logits_rows,
            is_greedy=bool(self.rows.is_plain[rows.rows].all()),
        )

    def step_failed(self, plan: SchedulerOutput) -> None:
        """Takes what the plan would have sampled for drawn: the next one may refer to it already.

        That one must not fail as well; its rows of these requests count for nothing.
        """
        for scheduled in plan.scheduled:
            if scheduled.sample and scheduled.request_id in self.rows:
                self._has_drawn[self.rows.row(scheduled.request_id)] = True

    def _remove(self, request_id: str) -> None:
        row = self.rows.remove(request_id)
        if row is not None:
            self.edits.pop(row, None)

    def _resolve_pending(self, step: PlanArrays, pending: NDArray[np.bool_]) -> None:
        rows = step.token_rows[pending]
        if not self._has_drawn[rows].all():
            raise ValueError("a plan refers to a sampled token, but its request sampled none")
        step.token_ids[pending] = -1 - rows

    def _write_tokens(self, views: HostViews, step: PlanArrays, key: StepKey) -> None:
        num_tokens, num_seqs = len(step.token_ids), len(step.rows)
        for name, values, filler in (
            ("input_ids", step.token_ids, 0),
            ("positions", step.positions, 0),
            ("slot_mapping", step.slots, -1),
        ):
            views[name][:num_tokens] = values
            views[name][num_tokens:] = filler
        views["seq_lens"][:num_seqs] = step.ends
        views["seq_lens"][num_seqs:] = 0
        views["query_start_loc"][: num_seqs + 1] = step.query_start_loc
        views["query_start_loc"][num_seqs + 1 :] = num_tokens
        # Rows are in range; "clip" keeps numpy from going through a temporary.
        np.take(
            self.rows.block_table,
            step.rows,
            axis=0,
            out=views["block_table"][:num_seqs],
            mode="clip",
        )

    def _write_sampled(
        self,
        views: HostViews,
        step: PlanArrays,
        rows: StepRows,
        key: StepKey,
        count_rows: dict[int, int],
    ) -> NDArray[np.int64]:
        """Which rows get logits, and what each of them asks for; those of nobody are greedy."""
        if key.has_all_logits:
            logits_rows = step.logits_indices.astype(np.int64)
            views["logits_indices"][:] = np.arange(key.num_seqs)
        else:
            logits_rows = np.arange(len(rows.places))
            views["logits_indices"][: len(logits_rows)] = step.logits_indices
            views["logits_indices"][len(logits_rows) :] = 0
        live, sampled_rows = self.rows, rows.rows
        if rows.drafts is not None and rows.num_before is not None:
            for name, of_rows, of_nobody in (
                ("drafts", rows.drafts, NO_DRAFT),
                ("num_before", rows.num_before, 0),
            ):
                views[name].fill(of_nobody)
                views[name][logits_rows] = of_rows
            has_drafts = (rows.drafts != NO_DRAFT) | (rows.num_before > 0)
            sampled_rows = np.where(has_drafts, self.unused_row, sampled_rows)
        self._has_drawn[rows.rows] = sampled_rows != self.unused_row
        for name, values, filler in (
            ("sampled_rows", sampled_rows, self.unused_row),
            ("temperature", live.temperature[rows.rows], 0.0),
            ("top_k", live.top_k[rows.rows], 0),
            ("top_p", live.top_p[rows.rows], 1.0),
            ("min_p", live.min_p[rows.rows], 0.0),
            ("uniforms", draws_for(live, rows), 0.0),
        ):
            views[name].fill(filler)
            views[name][logits_rows] = values
        for name, neutral in _NO_PENALTIES.items():
            views[name].fill(neutral)
        if self.edits:
            for at, row in zip(logits_rows.tolist(), rows.rows.tolist(), strict=True):
                if row in self.edits:
                    views["count_rows"][at] = count_rows.get(row, -1)
                    penalties = self.edits[row].penalties
                    views["repetition_penalty"][at] = penalties.repetition
                    views["presence_penalty"][at] = penalties.presence
                    views["frequency_penalty"][at] = penalties.frequency
        return logits_rows


def _write_groups(views: HostViews, groups: Sequence[PrefixGroup]) -> None:
    end = 0
    views["group_starts"][0] = 0
    for i, (members, num_blocks) in enumerate(groups):
        start, end = end, end + len(members)
        views["group_members"][start:end] = members
        views["group_starts"][i + 1] = end
        views["group_num_blocks"][i] = num_blocks
    views["group_members"][end:] = 0
    views["group_starts"][len(groups) + 1 :] = end
    views["group_num_blocks"][len(groups) :] = 0


def _write_states(
    views: HostViews,
    slots: NDArray[np.int32],
    saved_tokens: NDArray[np.int64],
    save_slots: NDArray[np.int32],
) -> None:
    """``slots`` ``[R]`` of the sequences; those that keep the states behind some tokens."""
    views["state_slots"][: len(slots)] = slots
    views["state_slots"][len(slots) :] = -1
    views["state_saves"].fill(-1)
    views["state_saves"][saved_tokens] = save_slots


def _write_adapters(views: HostViews, slots: NDArray[np.int32], key: StepKey) -> None:
    """``slots`` ``[T]``: each token's adapter, -1 for none."""
    padded = np.pad(slots, (0, key.num_tokens - len(slots)), constant_values=-1)
    whose = {"token": padded}
    if not key.has_all_logits:
        whose["logits"] = padded[views["logits_indices"]]
    for name, of_rows in whose.items():
        views[f"{name}_slots"][:] = of_rows
        order, starts = group_rows(of_rows, key.num_adapters)
        views[f"{name}_order"][:] = order
        views[f"{name}_starts"][:] = starts
