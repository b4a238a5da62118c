"""The memory that a step's tensors are views of, and the few sizes that a step may have.

oneDNN compiles a kernel for every number of rows that it meets: tens of milliseconds at the first
meeting and some hundred kilobytes kept. So steps are padded up to a short ladder of sizes, all of
which are met at warm-up::

    rows of the forward   | T tokens of the plan      | padding: id 0, slot -1, no request |
    logits_indices        | L rows that are sampled   | as many padding rows as L needs    |
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from streamserve.core.plan import PrefixGroup
from streamserve.models.batch import ForwardBatch
from streamserve_kernels import PrefixGroups
from streamserve_kernels.adapters import AdapterRows, StepAdapters
from streamserve_kernels.recurrent import StepStates

_SMALL_SIZES = (1, 2, 4)


def step_sizes(
    max_num_batched_tokens: int, max_num_seqs: int, num_recorded: int = 0
) -> tuple[int, ...]:
    """The ladder: 1, 2, 4, multiples of 8 up to 64, of 16 up to 256, then steps of an eighth.

    It reaches far enough that ``max_num_batched_tokens`` tokens and the padding of up to
    ``max_num_seqs`` sampled rows fit below its top. Steps of up to ``num_recorded`` tokens compile
    nothing and are not padded; if that is all of them, there is no ladder.
    """
    if num_recorded >= max_num_batched_tokens:
        return ()
    sizes = [*_SMALL_SIZES]
    while sizes[-1] < max(max_num_batched_tokens, max_num_seqs):
        last = sizes[-1]
        step = 8 if last < 64 else max(16, 1 << (last.bit_length() - 4))
        sizes.append(8 if last < 8 else last + step)
    # The full step is the commonest of the large ones: it gets a rung of its own.
    ladder = sorted({size for size in sizes if size < max_num_batched_tokens})
    ladder.append(max_num_batched_tokens)
    gaps = np.diff([0, *(size for size in sizes if size <= max_num_seqs), max_num_seqs])
    ladder.append(max_num_batched_tokens + max(8, int(gaps.max())))
    return (*range(1, num_recorded + 1), *(size for size in ladder if size > num_recorded))


class StepBuffers:
    """Room for one step, allocated and touched once. ``padded_sizes`` may be empty: no padding."""

    def __init__(
        self, max_tokens: int, max_seqs: int, max_blocks: int, padded_sizes: Sequence[int]
    ) -> None:
        self._padded_sizes = np.array(sorted(padded_sizes), dtype=np.int64)
        capacity = max([max_tokens, *padded_sizes])
        self._input_ids = np.zeros(capacity, dtype=np.int64)
        self._positions = np.zeros(capacity, dtype=np.int64)
        self._slot_mapping = np.full(capacity, -1, dtype=np.int64)
        self._query_start_loc = np.zeros(max_seqs + 1, dtype=np.int32)
        self._seq_lens = np.zeros(max_seqs, dtype=np.int32)
        self._block_table = np.zeros(max_seqs * max_blocks, dtype=np.int32)
        self._logits_indices = np.zeros(capacity, dtype=np.int64)
        self._group_members = np.zeros(max_seqs, dtype=np.int32)
        self._group_starts = np.zeros(max_seqs // 2 + 1, dtype=np.int32)
        self._group_num_blocks = np.zeros(max_seqs // 2, dtype=np.int32)
        self._prefix_groups: Sequence[PrefixGroup] = ()
        self._num_members = 0
        self._num_seqs = 0
        self._max_query_len = self._max_seq_len = 0
        self._num_blocks = 1
        self._num_rows = 0
        self._num_logits = 0
        self._adapters: NDArray[np.int32] | None = None
        self._state_slots: NDArray[np.int32] | None = None
        self._state_saves = np.full(capacity, -1, dtype=np.int32)

    def set_sequences(
        self,
        query_start_loc: NDArray[np.int32],
        lengths: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> None:
        """Sets where sequences' tokens start ``[R + 1]``, how many they are, and where they end."""
        self._num_seqs = len(lengths)
        self._seq_lens[: len(ends)] = ends
        self._max_query_len, self._max_seq_len = int(lengths.max()), int(ends.max())
        self._query_start_loc[: len(query_start_loc)] = query_start_loc

    def set_block_table(
        self, block_table: NDArray[np.int32], rows: NDArray[np.int64], width: int
    ) -> None:
        """Gathers ``rows`` of the table, as wide as the longest sequence of the step needs."""
        self._num_blocks = width
        out = self._block_table[: len(rows) * width].reshape(len(rows), width)
        # Rows are in range; "clip" keeps numpy from going through a temporary.
        np.take(block_table[:, :width], rows, axis=0, out=out, mode="clip")

    def set_prefix_groups(self, groups: Sequence[PrefixGroup]) -> None:
        """Sets who shares leading blocks; a request of the plan is the sequence of its index.

        The steps between two comings or goings have the same groups: they are written once.
        """
        if groups == self._prefix_groups:
            return
        self._prefix_groups = groups
        end = 0
        for i, (members, num_blocks) in enumerate(groups):
            start, end = end, end + len(members)
            self._group_members[start:end] = members
            self._group_starts[i + 1] = end
            self._group_num_blocks[i] = num_blocks
        self._num_members = end

    def set_tokens(
        self,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        slots: NDArray[np.int64],
        logits_indices: NDArray[np.int32],
    ) -> None:
        """Sets the tokens' rows and the rows that need logits, and pads both."""
        count, num_logits = len(token_ids), len(logits_indices)
        self._num_logits = self._padded(num_logits) if num_logits else 0
        extra = self._num_logits - num_logits
        self._num_rows = self._padded(count + extra)
        self._input_ids[:count] = token_ids
        self._positions[:count] = positions
        self._slot_mapping[:count] = slots
        self._input_ids[count : self._num_rows] = 0
        self._positions[count : self._num_rows] = 0
        self._slot_mapping[count : self._num_rows] = -1
        self._logits_indices[:num_logits] = logits_indices
        self._logits_indices[num_logits : self._num_logits] = np.arange(count, count + extra)

    def set_adapters(self, slots: NDArray[np.int32] | None) -> None:
        """Sets each token's adapter ``[T]``, -1 for none, after `set_tokens`; None: all -1."""
        if slots is None:
            self._adapters = None
            return
        padding = self._num_rows - len(slots)
        self._adapters = np.pad(slots, (0, padding), constant_values=-1)

    def set_states(
        self,
        slots: NDArray[np.int32],
        saved_tokens: NDArray[np.int64],
        save_slots: NDArray[np.int32],
    ) -> None:
        """Sets each sequence's slot ``[R]``, and those that keep the states behind some tokens."""
        self._state_slots = slots
        self._state_saves[: self._num_rows] = -1
        self._state_saves[saved_tokens] = save_slots

    def tensors(self, device: torch.device) -> ForwardBatch:
        """The step as the model takes it: views on a CPU, copies on another device."""
        num_rows, num_seqs = self._num_rows, self._num_seqs
        table = self._block_table[: num_seqs * self._num_blocks]

        def tensor(values: NDArray[np.int32] | NDArray[np.int64]) -> torch.Tensor:
            on_host = torch.from_numpy(values)
            return on_host if device.type == "cpu" else on_host.to(device)

        prefix_groups = None
        if num_groups := len(self._prefix_groups):
            prefix_groups = PrefixGroups(
                members=tensor(self._group_members[: self._num_members]),
                starts=tensor(self._group_starts[: num_groups + 1]),
                num_blocks=tensor(self._group_num_blocks[:num_groups]),
            )
        states = None
        if self._state_slots is not None:
            saves = tensor(self._state_saves[:num_rows])
            states = StepStates(tensor(self._state_slots), saves)
        return ForwardBatch(
            input_ids=tensor(self._input_ids[:num_rows]),
            positions=tensor(self._positions[:num_rows]),
            slot_mapping=tensor(self._slot_mapping[:num_rows]),
            query_start_loc=tensor(self._query_start_loc[: num_seqs + 1]),
            seq_lens=tensor(self._seq_lens[:num_seqs]),
            block_table=tensor(table.reshape(num_seqs, self._num_blocks)),
            logits_indices=tensor(self._logits_indices[: self._num_logits]),
            prefix_groups=prefix_groups,
            adapters=self._step_adapters(device),
            states=states,
            max_query_len=self._max_query_len,
            max_seq_len=self._max_seq_len,
        )

    def _step_adapters(self, device: torch.device) -> StepAdapters | None:
        if self._adapters is None:
            return None
        of_logits = self._adapters[self._logits_indices[: self._num_logits]]
        return StepAdapters(
            *(AdapterRows.of(slots, device) for slots in (self._adapters, of_logits))
        )

    def _padded(self, count: int) -> int:
        place = int(np.searchsorted(self._padded_sizes, count))
        return int(self._padded_sizes[place]) if place < len(self._padded_sizes) else count
