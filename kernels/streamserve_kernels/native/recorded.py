"""A forward that was written down, run: one call a step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from streamserve_kernels.interface import StepTensors
from streamserve_kernels.native.execute import Executable, group_fields, pack_step, state_fields
from streamserve_kernels.pool import pool


class RecordedProgram:
    """Runs steps of up to ``max_tokens`` tokens, each in one call. One thread at a time.

    What it returns is overwritten by the next step.
    """

    def __init__(
        self,
        executable: Executable,
        max_tokens: int,
        states: Tensor,
        logits: Tensor,
        token_ids: Tensor,
        keep: list[object],
        slots: tuple[Tensor, Tensor] | None = None,
        tapped: Sequence[Tensor] = (),
        given: Tensor | None = None,
    ) -> None:
        self.max_tokens = max_tokens
        self.max_logits = logits.shape[0]
        self._executable = executable
        self._states = states
        self._logits = logits
        self._token_ids = token_ids
        self._keep = keep
        self._slots = slots
        self._tapped = tapped
        self._given = given
        self._threads = pool().threads()

    def logits(self, batch: StepTensors) -> Tensor:
        """Logits [L, V] float32 of the rows that need them; keys and values are written."""
        return self._run(batch, self._logits, wants_logits=True)

    def greedy(self, batch: StepTensors) -> Tensor:
        """The arg-max [L] int64 of the same rows, the first of equals: no logits are stored."""
        return self._run(batch, self._token_ids, wants_logits=False)

    def hidden_states(self, num_rows: int) -> Tensor:
        """What the head was given [num_rows, H] bfloat16 in the step that ran last."""
        return self._states[:num_rows]

    def tapped(self, num_tokens: int) -> list[Tensor]:
        """What else it was recorded to give, [num_tokens, H] bfloat16 each."""
        return [rows[:num_tokens] for rows in self._tapped]

    def _run(self, batch: StepTensors, result: Tensor, *, wants_logits: bool) -> Tensor:
        num_tokens, num_logits = batch.input_ids.shape[0], batch.logits_indices.shape[0]
        if num_tokens > self.max_tokens or num_logits > self.max_logits:
            raise ValueError(
                f"a recorded step takes at most {self.max_tokens} tokens and"
                f" {self.max_logits} logits, got {num_tokens} and {num_logits}"
            )
        if self._slots is not None:
            assert batch.adapters is not None, "recorded with adapters"
            self._slots[0][:num_tokens] = batch.adapters.tokens.slots
            self._slots[1][:num_logits] = batch.adapters.logits.slots
        if self._given is not None:
            assert batch.hidden_states is not None, "recorded with some"
            self._given[:num_tokens] = batch.hidden_states
        step = pack_step(
            num_tokens,
            num_logits,
            batch.seq_lens.shape[0],
            batch.block_table.stride(0),
            batch.input_ids.data_ptr(),
            batch.positions.data_ptr(),
            batch.slot_mapping.data_ptr(),
            batch.logits_indices.data_ptr(),
            batch.query_start_loc.data_ptr(),
            batch.seq_lens.data_ptr(),
            batch.block_table.data_ptr(),
            *group_fields(batch.prefix_groups),
            int(wants_logits),
            *state_fields(batch.states),
        )
        self._executable.run(step, self._threads)
        return result[:num_logits]
