"""What the runner remembers of each live request, and one step's tensors made from it.

Every request has a row in arrays that live as long as the runner; a step gathers its rows with a
few vectorised copies into buffers allocated once. Everything here runs on the device thread.

A plan is taken in two parts, so that a forward that fails cannot leave the books half written:

    apply(plan)     released ids out, new requests in, block tables extended
    build(plan)     the step's tensors; reads the books only
    record(…)       the sampled ids, for PENDING_TOKEN and for the penalties' history
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from streamserve.core.plan import PENDING_TOKEN, NewRequest, SchedulerOutput
from streamserve.models.batch import ForwardBatch
from streamserve.runner.logits_edits import LogitsEdits
from streamserve.runner.philox import uniforms
from streamserve.runner.sampler import SamplingBatch
from streamserve.runner.step_buffers import StepBuffers

_UNKNOWN_TOKEN = -1


@dataclass(frozen=True, slots=True)
class StepRows:
    """Who is sampled in a step: L requests, in plan order."""

    request_ids: list[str]
    places: list[int]  # [L] where each stands in ``SchedulerOutput.scheduled``
    rows: NDArray[np.int64]  # [L] rows of the input batch
    output_positions: NDArray[np.int64]  # [L]
    ends: NDArray[np.int64]  # [L] the position that each sampled token will have


class InputBatch:
    """Persistent rows of live requests. The number of rows grows when more requests are live."""

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
    ) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._device = device
        self._max_blocks = -(-max_model_len // block_size) + 1
        self._rows: dict[str, int] = {}
        self._edits: dict[str, LogitsEdits] = {}
        # Two steps in flight: a leaving request may overlap with the one that takes its seat.
        self._allocate_rows(2 * max_num_seqs)
        self._free_rows = list(range(self._num_rows - 1, -1, -1))
        self._buffers = StepBuffers(
            max_num_batched_tokens, max_num_seqs, self._max_blocks, padded_sizes
        )

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def request_ids(self) -> list[str]:
        """Live requests, oldest first."""
        return list(self._rows)

    def block_table(self, request_id: str) -> list[int]:
        """The blocks of a live request."""
        row = self._rows[request_id]
        blocks: list[int] = self._block_table[row, : self._num_blocks[row]].tolist()
        return blocks

    def apply(self, plan: SchedulerOutput) -> None:
        """Takes over what the plan says about requests; raises ValueError if it cannot be so."""
        for request_id in plan.released_ids:
            self._remove(request_id)
        for request in plan.new_requests:
            self._remove(request.request_id)
            self._add(request)
        for scheduled in plan.scheduled:
            if scheduled.new_block_ids:
                self._append_blocks(scheduled.request_id, scheduled.new_block_ids)
            edits = self._edits.get(scheduled.request_id)
            if edits is not None and edits.history is not None:
                edits.history.extend(scheduled.start, scheduled.token_ids)

    def build(self, plan: SchedulerOutput) -> tuple[ForwardBatch, StepRows]:
        """The tensors of a plan that was applied and schedules something.

        They are overwritten by the next call. Raises ValueError if the plan cannot be right.
        """
        scheduled = plan.scheduled
        rows = np.array([self._rows[s.request_id] for s in scheduled], dtype=np.int64)
        starts = np.array([s.start for s in scheduled], dtype=np.int64)
        lengths = np.array([len(s.token_ids) for s in scheduled], dtype=np.int64)
        token_ids = np.array(
            list(chain.from_iterable([s.token_ids for s in scheduled])), dtype=np.int64
        )
        places = [i for i, s in enumerate(scheduled) if s.sample]
        ends = starts + lengths
        self._check(plan, rows, lengths, ends)

        buffers = self._buffers
        query_start_loc = buffers.set_sequences(lengths, ends)
        if len(token_ids) == len(scheduled):
            token_rows, positions = rows, starts
        else:
            token_rows = np.repeat(rows, lengths)
            positions = np.arange(len(token_ids)) + np.repeat(
                starts - query_start_loc[:-1], lengths
            )
        if token_ids.min() < 0:
            self._resolve_pending(token_ids, token_rows)
        blocks, offsets = np.divmod(positions, self._block_size)
        token_blocks = self._block_table[token_rows, blocks].astype(np.int64)
        slots = token_blocks * self._block_size + offsets
        place_array = np.array(places, dtype=np.int64)
        buffers.set_block_table(self._block_table, rows, int(blocks.max()) + 1)
        buffers.set_prefix_groups(plan.prefix_groups)
        buffers.set_tokens(token_ids, positions, slots, query_start_loc[1:][place_array] - 1)
        forward_batch = buffers.tensors(self._device)
        step_rows = StepRows(
            request_ids=[scheduled[i].request_id for i in places],
            places=places,
            rows=rows[place_array],
            output_positions=np.array([scheduled[i].output_position for i in places], np.int64),
            ends=ends[place_array],
        )
        return forward_batch, step_rows

    def is_greedy(self, step: StepRows) -> bool:
        """Whether the arg-max of each row is all that the step's requests ask for."""
        return bool(self._is_plain[step.rows].all())

    def sampling_batch(
        self, step: StepRows, masks: Mapping[str, bytes] | None
    ) -> SamplingBatch | None:
        """What the step's rows ask for; ``None`` if every one is a plain arg-max."""
        rows = step.rows
        if not masks and self.is_greedy(step):
            return None
        temperature = self._temperature[rows]
        if temperature.any():
            draws = uniforms(self._seed[rows], self._choice_index[rows], step.output_positions)
        else:
            draws = np.zeros(len(rows))
        edits = {
            i: self._edits[request_id]
            for i, request_id in enumerate(step.request_ids)
            if request_id in self._edits
        }
        row_masks = {
            i: masks[request_id]
            for i, request_id in enumerate(step.request_ids)
            if masks and request_id in masks
        }
        return SamplingBatch(
            temperature=temperature,
            top_k=self._top_k[rows],
            top_p=self._top_p[rows],
            min_p=self._min_p[rows],
            uniforms=draws,
            output_positions=step.output_positions,
            num_logprobs=self._num_logprobs[rows],
            edits=edits,
            masks=row_masks,
        )

    def record(self, step: StepRows, token_ids: NDArray[np.int64]) -> None:
        """Remembers the sampled ids ``[L]`` of a step."""
        self._last_token[step.rows] = token_ids
        if not self._edits:
            return
        for i, request_id in enumerate(step.request_ids):
            edits = self._edits.get(request_id)
            if edits is not None and edits.history is not None:
                edits.history.extend(int(step.ends[i]), [int(token_ids[i])])

    def record_failure(self, plan: SchedulerOutput) -> None:
        """Notes that the step sampled nothing.

        A step that is already in flight behind it may ask for the missing ids. Its requests that
        failed here are lost anyway; any id lets the others in that step go on.
        """
        for scheduled in plan.scheduled:
            row = self._rows.get(scheduled.request_id)
            if row is not None and scheduled.sample:
                self._last_token[row] = 0

    def _allocate_rows(self, num_rows: int) -> None:
        self._num_rows = num_rows
        # Block 0 is a valid block: rows may be read past the blocks that they have.
        self._block_table = np.zeros((num_rows, self._max_blocks), dtype=np.int32)
        self._num_blocks = np.zeros(num_rows, dtype=np.int64)
        self._last_token = np.full(num_rows, _UNKNOWN_TOKEN, dtype=np.int64)
        self._temperature = np.zeros(num_rows, dtype=np.float32)
        self._top_k = np.zeros(num_rows, dtype=np.int64)
        self._top_p = np.ones(num_rows, dtype=np.float64)
        self._min_p = np.zeros(num_rows, dtype=np.float32)
        self._seed = np.zeros(num_rows, dtype=np.int64)
        self._choice_index = np.zeros(num_rows, dtype=np.int64)
        self._num_logprobs = np.full(num_rows, -1, dtype=np.int64)
        self._is_plain = np.ones(num_rows, dtype=np.bool_)

    def _grow_rows(self) -> None:
        names = (
            "_block_table", "_num_blocks", "_last_token", "_temperature", "_top_k", "_top_p",
            "_min_p", "_seed", "_choice_index", "_num_logprobs", "_is_plain",
        )  # fmt: skip
        old = {name: getattr(self, name) for name in names}
        num_old = self._num_rows
        self._allocate_rows(2 * num_old)
        for name, values in old.items():
            getattr(self, name)[:num_old] = values
        self._free_rows.extend(range(self._num_rows - 1, num_old - 1, -1))

    def _add(self, request: NewRequest) -> None:
        if not self._free_rows:
            self._grow_rows()
        row = self._free_rows.pop()
        params = request.sampling_params
        self._rows[request.request_id] = row
        self._num_blocks[row] = 0
        self._last_token[row] = _UNKNOWN_TOKEN
        self._temperature[row] = params.temperature
        self._top_k[row] = params.top_k if params.top_k < self._vocab_size else 0
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seed[row] = (request.seed + 2**63) % 2**64 - 2**63  # any integer, as 64 bits
        self._choice_index[row] = request.choice_index
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        needs_edits = LogitsEdits.are_needed(request)
        if needs_edits:
            self._edits[request.request_id] = LogitsEdits(request, self._vocab_size)
        self._is_plain[row] = params.is_greedy and not needs_edits and params.logprobs is None

    def _remove(self, request_id: str) -> None:
        """Forgets a request; one that never entered a plan is none of the runner's business."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            self._edits.pop(request_id, None)
            self._free_rows.append(row)

    def _append_blocks(self, request_id: str, block_ids: list[int]) -> None:
        row = self._rows[request_id]
        start = int(self._num_blocks[row])
        end = start + len(block_ids)
        if end > self._max_blocks:
            raise ValueError(
                f"request {request_id!r} was given {end} blocks; max_model_len allows "
                f"{self._max_blocks}"
            )
        self._block_table[row, start:end] = block_ids
        self._num_blocks[row] = end

    def _check(
        self,
        plan: SchedulerOutput,
        rows: NDArray[np.int64],
        lengths: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> None:
        """A token without a block of its own would be written into somebody else's."""
        wrong = (lengths < 1) | (ends > self._num_blocks[rows] * self._block_size)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ValueError(
                f"request {plan.scheduled[i].request_id!r} computes {int(lengths[i])} tokens up to "
                f"{int(ends[i])} and has {int(self._num_blocks[rows[i]])} blocks of "
                f"{self._block_size}"
            )

    def _resolve_pending(self, token_ids: NDArray[np.int64], token_rows: NDArray[np.int64]) -> None:
        pending = token_ids == PENDING_TOKEN
        token_ids[pending] = self._last_token[token_rows[pending]]
        if token_ids.min() < 0:
            raise ValueError("a plan refers to a sampled token, but its request sampled none")
