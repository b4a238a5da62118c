"""One step's tensors on a CPU, made from what is remembered of each live request.

Everything here runs on the device thread.

A plan is taken in two parts, so that a forward that fails cannot leave the books half written:

    apply(plan)     released ids out, new requests in, block tables extended
    build(plan)     the step's tensors; reads the books only
    record(…)       the sampled ids, for PENDING_TOKEN and for the penalties' history
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from streamserve.core.plan import (
    PENDING_TOKEN,
    Masks,
    NewRequest,
    SchedulerOutput,
    mask_of,
)
from streamserve.models.batch import ForwardBatch
from streamserve.runner.logits_edits import LogitsEdits
from streamserve.runner.plan_arrays import PlanArrays, StepRows, draws_for
from streamserve.runner.request_rows import RequestRows
from streamserve.runner.sampler import SamplingBatch
from streamserve.runner.step_buffers import StepBuffers

_UNKNOWN_TOKEN = -1


class InputBatch:
    """The live requests and the buffers of a step. One device thread."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
        padded_sizes: Sequence[int] = (),
        keeps_states: bool = False,
    ) -> None:
        self._keeps_states = keeps_states
        self._vocab_size = vocab_size
        self._device = device
        # Two steps in flight: a leaving request may overlap with the one that takes its seat.
        self._rows = RequestRows(
            num_rows=2 * max_num_seqs,
            max_model_len=max_model_len,
            block_size=block_size,
            vocab_size=vocab_size,
        )
        self._last_token = np.full(2 * max_num_seqs, _UNKNOWN_TOKEN, dtype=np.int64)
        self._edits: dict[str, LogitsEdits] = {}
        self._buffers = StepBuffers(
            max_num_batched_tokens, max_num_seqs, self._rows.max_blocks, padded_sizes
        )

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def request_ids(self) -> list[str]:
        """Live requests, oldest first."""
        return self._rows.request_ids

    def block_table(self, request_id: str) -> list[int]:
        """The blocks of a live request."""
        return self._rows.blocks(request_id)

    def apply(self, plan: SchedulerOutput) -> None:
        """Takes over what the plan says about requests; raises ValueError if it cannot be so."""
        for request_id in plan.released_ids:
            self._remove(request_id)
        for request in plan.new_requests:
            self._remove(request.request_id)
            self._add(request)
        self._rows.move_states(plan.state_moves)
        for scheduled in plan.scheduled:
            if scheduled.new_block_ids:
                self._rows.append_blocks(scheduled.request_id, scheduled.new_block_ids)
            edits = self._edits.get(scheduled.request_id)
            if edits is not None:
                num_drafts = max(scheduled.sample - 1, 0)
                known = scheduled.token_ids[: len(scheduled.token_ids) - num_drafts]
                edits.extend(scheduled.start, known)

    def build(self, plan: SchedulerOutput) -> tuple[ForwardBatch, StepRows]:
        """The tensors of a plan that was applied and schedules something.

        They are overwritten by the next call. Raises ValueError if the plan cannot be right.
        """
        scheduled = plan.scheduled
        step = PlanArrays(plan, self._rows)
        buffers = self._buffers
        buffers.set_sequences(step.query_start_loc, step.lengths, step.ends)
        if step.token_ids.min() < 0:
            self._resolve_pending(step.token_ids, step.token_rows)
        width = int(step.positions.max()) // self._rows.block_size + 1
        buffers.set_block_table(self._rows.block_table, step.rows, width)
        buffers.set_prefix_groups(plan.prefix_groups)
        buffers.set_tokens(step.token_ids, step.positions, step.slots, step.logits_indices)
        has_adapters = self._rows.have_adapters(step.rows)
        buffers.set_adapters(self._rows.adapter[step.token_rows] if has_adapters else None)
        if self._keeps_states:
            buffers.set_states(self._rows.state_slot[step.rows], *step.saves(plan))
        return buffers.tensors(self._device), step.sampled(scheduled)

    def is_greedy(self, step: StepRows) -> bool:
        """Whether the arg-max of each row is all that the step's requests ask for."""
        return bool(self._rows.is_plain[step.rows].all())

    def sampling_batch(self, step: StepRows, masks: Masks | None) -> SamplingBatch | None:
        """What the step's rows ask for; ``None`` if every one is a plain arg-max."""
        rows, live = step.rows, self._rows
        if not masks and self.is_greedy(step):
            return None
        edits = {
            i: self._edits[request_id]
            for i, request_id in enumerate(step.request_ids)
            if request_id in self._edits
        }
        row_masks = {
            i: mask
            for i, request_id in enumerate(step.request_ids)
            if masks and (mask := mask_of(masks, request_id, step.index_of(i))) is not None
        }
        return SamplingBatch(
            temperature=live.temperature[rows],
            top_k=live.top_k[rows],
            top_p=live.top_p[rows],
            min_p=live.min_p[rows],
            uniforms=draws_for(live, step),
            output_positions=step.output_positions,
            num_logprobs=live.num_logprobs[rows],
            edits=edits,
            masks=row_masks,
            drafts={i: step.drafts_before(i) for i in edits} if step.drafts is not None else {},
        )

    def record(self, step: StepRows, token_ids: NDArray[np.int64]) -> None:
        """Remembers the sampled ids ``[L]`` of a step."""
        self._last_token[step.rows] = token_ids
        if not self._edits:
            return
        for i, request_id in enumerate(step.request_ids):
            edits = self._edits.get(request_id)
            if edits is not None:
                edits.extend(int(step.ends[i]), [int(token_ids[i])])

    def record_failure(self, plan: SchedulerOutput) -> None:
        """Notes that the step sampled nothing.

        A step that is already in flight behind it may ask for the missing ids. What it samples for
        requests that failed here counts for nothing; any id lets the others in that step go on.
        """
        for scheduled in plan.scheduled:
            if scheduled.sample and scheduled.request_id in self._rows:
                self._last_token[self._rows.row(scheduled.request_id)] = 0

    def _add(self, request: NewRequest) -> None:
        row = self._rows.add(request)
        if len(self._last_token) < self._rows.num_rows:
            more = self._rows.num_rows - len(self._last_token)
            self._last_token = np.pad(self._last_token, (0, more), constant_values=_UNKNOWN_TOKEN)
        self._last_token[row] = _UNKNOWN_TOKEN
        if LogitsEdits.are_needed(request):
            self._edits[request.request_id] = LogitsEdits(request, self._vocab_size)

    def _remove(self, request_id: str) -> None:
        """Forgets a request; one that never entered a plan is none of the runner's business."""
        if self._rows.remove(request_id) is not None:
            self._edits.pop(request_id, None)

    def _resolve_pending(self, token_ids: NDArray[np.int64], token_rows: NDArray[np.int64]) -> None:
        pending = token_ids == PENDING_TOKEN
        token_ids[pending] = self._last_token[token_rows[pending]]
        if token_ids.min() < 0:
            raise ValueError("a plan refers to a sampled token, but its request sampled none")
