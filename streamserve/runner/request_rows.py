"""What a runner remembers of each live request: a row in arrays that live as long as the runner.

Block tables and sampling parameters; a step gathers its rows with a few vectorised copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streamserve.core.plan import NewRequest, ScheduledRequest, StateMove
from streamserve.runner.logits_edits import LogitsEdits

Int64Array = NDArray[np.int64]


class RequestRows:
    """Rows of live requests, every array ``[rows]`` or ``[rows, max_blocks]``.

    Their number doubles when more requests are live, up to ``max_rows``.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        max_rows: int | None = None,
    ) -> None:
        self.block_size = block_size
        self.max_blocks = -(-max_model_len // block_size) + 1
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._row_of: dict[str, int] = {}
        self._allocate(num_rows)
        self._free = list(range(num_rows - 1, -1, -1))
        self.num_adapted = 0  # requests with an adapter

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._row_of

    @property
    def request_ids(self) -> list[str]:
        """Live requests, oldest first."""
        return list(self._row_of)

    def row(self, request_id: str) -> int:
        """The row of a live request."""
        return self._row_of[request_id]

    def rows(self, scheduled: Sequence[ScheduledRequest]) -> Int64Array:
        """The rows of a plan's requests."""
        row_of = self._row_of
        return np.array([row_of[s.request_id] for s in scheduled], dtype=np.int64)

    def blocks(self, request_id: str) -> list[int]:
        """The blocks of a live request."""
        row = self._row_of[request_id]
        blocks: list[int] = self.block_table[row, : self.num_blocks[row]].tolist()
        return blocks

    def add(self, request: NewRequest) -> int:
        """Gives a request a row of its own; its block table is empty."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        params = request.sampling_params
        self._row_of[request.request_id] = row
        self.num_blocks[row] = 0
        self.temperature[row] = params.temperature
        self.top_k[row] = params.top_k if params.top_k < self._vocab_size else 0
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.seed[row] = (request.seed + 2**63) % 2**64 - 2**63  # any integer, as 64 bits
        self.choice_index[row] = request.choice_index
        self.state_slot[row] = -1 if request.state_slot is None else request.state_slot
        self.adapter[row] = -1 if request.adapter is None else request.adapter
        self.num_adapted += request.adapter is not None
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.is_plain[row] = (
            params.is_greedy
            and params.logprobs is None
            and params.structured_output is None
            and params.thinking is None
            and not LogitsEdits.are_needed(request)
        )
        return row

    def remove(self, request_id: str) -> int | None:
        """Frees the row of a request; one that never entered a plan has none."""
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self._free.append(row)
            self.num_adapted -= int(self.adapter[row] >= 0)
        return row

    def move_states(self, moves: Sequence[StateMove]) -> None:
        """Live requests have their states in other slots."""
        for request_id, slot in moves:
            self.state_slot[self._row_of[request_id]] = slot

    def have_adapters(self, rows: Int64Array) -> bool:
        """Whether a request of these rows has an adapter."""
        return self.num_adapted > 0 and bool((self.adapter[rows] >= 0).any())

    def append_blocks(self, request_id: str, block_ids: list[int]) -> None:
        """Raises ValueError if the table is longer than the context can need."""
        row = self._row_of[request_id]
        start = int(self.num_blocks[row])
        end = start + len(block_ids)
        if end > self.max_blocks:
            raise ValueError(
                f"request {request_id!r} was given {end} blocks; max_model_len allows "
                f"{self.max_blocks}"
            )
        self.block_table[row, start:end] = block_ids
        self.num_blocks[row] = end

    def check(
        self,
        scheduled: Sequence[ScheduledRequest],
        rows: Int64Array,
        lengths: Int64Array,
        ends: Int64Array,
    ) -> None:
        """Raises ValueError for a token without a block: it would be written into another's."""
        wrong = (lengths < 1) | (ends > self.num_blocks[rows] * self.block_size)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ValueError(
                f"request {scheduled[i].request_id!r} computes {int(lengths[i])} tokens up to "
                f"{int(ends[i])} and has {int(self.num_blocks[rows[i]])} blocks of "
                f"{self.block_size}"
            )

    def slots(self, token_rows: Int64Array, positions: Int64Array) -> Int64Array:
        """Where in the cache the tokens at ``positions`` ``[T]`` of ``token_rows`` lie."""
        blocks, offsets = np.divmod(positions, self.block_size)
        slots: Int64Array = self.block_table[token_rows, blocks].astype(np.int64)
        slots *= self.block_size
        slots += offsets
        return slots

    def _allocate(self, num_rows: int) -> None:
        self.num_rows = num_rows
        # Block 0 is a valid block: rows may be read past the blocks that they have.
        self.block_table = np.zeros((num_rows, self.max_blocks), dtype=np.int32)
        self.num_blocks = np.zeros(num_rows, dtype=np.int64)
        self.temperature = np.zeros(num_rows, dtype=np.float32)
        self.top_k = np.zeros(num_rows, dtype=np.int64)
        self.top_p = np.ones(num_rows, dtype=np.float64)
        self.min_p = np.zeros(num_rows, dtype=np.float32)
        self.seed = np.zeros(num_rows, dtype=np.int64)
        self.choice_index = np.zeros(num_rows, dtype=np.int64)
        self.num_logprobs = np.full(num_rows, -1, dtype=np.int64)
        self.is_plain = np.ones(num_rows, dtype=np.bool_)
        self.adapter = np.full(num_rows, -1, dtype=np.int32)
        self.state_slot = np.full(num_rows, -1, dtype=np.int32)

    def _grow(self) -> None:
        num_old = self.num_rows
        num_new = 2 * num_old
        if self._max_rows is not None and num_new > self._max_rows:
            raise RuntimeError(f"more than {num_old} requests are live in the model runner")
        names = (
            "block_table", "num_blocks", "temperature", "top_k", "top_p", "min_p", "seed",
            "choice_index", "num_logprobs", "is_plain", "adapter", "state_slot",
        )  # fmt: skip
        old = {name: getattr(self, name) for name in names}
        self._allocate(num_new)
        for name, values in old.items():
            getattr(self, name)[:num_old] = values
        self._free.extend(range(num_new - 1, num_old - 1, -1))
