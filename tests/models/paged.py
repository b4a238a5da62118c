"""A paged cache driven by hand: what a runner does to a decoder, in the fewest lines.

Block ids and slots are dealt in shuffled order and start out full of NaN-free rubbish, so that a
read of a wrong block or a stale row shows. States are kept at the end of every block.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from streamserve.core.prefix_groups import find_groups
from streamserve.models import ForwardBatch, LanguageModel, allocate_kv_cache, state_caches
from streamserve_kernels import PrefixGroups
from streamserve_kernels.recurrent import StepStates


class Sequence:
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = list(tokens)
        self.block_table: list[int] = []
        self.num_computed = 0
        self.slot: int | None = None  # of its state
        self.saved: dict[int, int] = {}  # by number of blocks, the slot with the state behind them


class PagedHarness:
    """With ``cascade`` every batch says which of its sequences share leading blocks."""

    def __init__(
        self,
        decoder: LanguageModel,
        *,
        num_blocks: int = 128,
        block_size: int = 4,
        cascade: bool = False,
    ) -> None:
        self.decoder = decoder
        self.cascade = cascade
        self.num_members = 0  # of prefix groups, over all batches
        self.block_size = block_size
        generator = torch.Generator().manual_seed(3)
        self.free = torch.randperm(num_blocks, generator=generator).tolist()
        self.has_states = len(decoder.spec.attentions()) < len(decoder.spec.caches())
        num_slots = 2 * num_blocks if self.has_states else 0
        self.free_slots = torch.randperm(num_slots, generator=generator).tolist()
        self.caches = allocate_kv_cache(
            decoder.spec,
            num_blocks,
            block_size,
            decoder.dtype,
            decoder.device,
            decoder.kernels,
            num_state_slots=num_slots,
        )
        for cache in (cache for pair in self.caches for cache in pair):
            rubbish = torch.empty(cache.shape, dtype=cache.dtype)
            cache.copy_(rubbish.normal_(0.0, 10.0, generator=generator))

    def share_prefix(self, sequence: Sequence, other: Sequence) -> None:
        """Lets ``sequence`` start on the full blocks whose tokens it has in common."""
        limit = min(len(sequence.tokens) - 1, other.num_computed)
        common = 0
        while common < limit and sequence.tokens[common] == other.tokens[common]:
            common += 1
        blocks = common // self.block_size
        sequence.block_table = other.block_table[:blocks]
        sequence.num_computed = blocks * self.block_size
        if self.has_states and blocks:
            sequence.slot = self.free_slots.pop()
            for cache in state_caches(self.decoder.spec, self.caches):
                cache[sequence.slot] = cache[other.saved[blocks]]

    def batch(
        self,
        work: list[tuple[Sequence, int]],
        *,
        all_rows: bool = False,
        padding: int = 0,
    ) -> ForwardBatch:
        """The next ``count`` tokens of each (sequence, count), and rows of padding after them.

        Logits are asked for where a sequence has caught up, or for every row.
        """
        ids, positions, slots, starts, lengths, rows = [], [], [], [0], [], []
        for sequence, count in work:
            start, end = sequence.num_computed, sequence.num_computed + count
            while len(sequence.block_table) * self.block_size < end:
                sequence.block_table.append(self.free.pop())
            ids += sequence.tokens[start:end]
            positions += range(start, end)
            slots += [
                sequence.block_table[p // self.block_size] * self.block_size + p % self.block_size
                for p in range(start, end)
            ]
            if all_rows:
                rows += range(starts[-1], starts[-1] + count)
            elif end == len(sequence.tokens):
                rows.append(starts[-1] + count - 1)
            starts.append(starts[-1] + count)
            lengths.append(end)
        widest = max(len(sequence.block_table) for sequence, _ in work)
        table = [s.block_table + [0] * (widest - len(s.block_table)) for s, _ in work]
        device = self.decoder.device
        return ForwardBatch(
            input_ids=torch.tensor(ids + [0] * padding, device=device),
            positions=torch.tensor(positions + [0] * padding, device=device),
            slot_mapping=torch.tensor(slots + [-1] * padding, device=device),
            query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            block_table=torch.tensor(table, dtype=torch.int32, device=device),
            logits_indices=torch.tensor(rows, dtype=torch.int64, device=device),
            prefix_groups=self._groups([sequence for sequence, _ in work]),
            states=self._states(work, padding) if self.has_states else None,
        )

    def _states(self, work: list[tuple[Sequence, int]], padding: int) -> StepStates:
        slots, saves = [], []
        for sequence, count in work:
            if sequence.slot is None:
                sequence.slot = self.free_slots.pop()
            slots.append(sequence.slot)
            for position in range(sequence.num_computed + 1, sequence.num_computed + count + 1):
                blocks, rest = divmod(position, self.block_size)
                if rest == 0:
                    sequence.saved[blocks] = self.free_slots.pop()
                saves.append(-1 if rest else sequence.saved[blocks])
        device = self.decoder.device
        return StepStates(
            torch.tensor(slots, dtype=torch.int32, device=device),
            torch.tensor(saves + [-1] * padding, dtype=torch.int32, device=device),
        )

    def _groups(self, sequences: list[Sequence]) -> PrefixGroups | None:
        full = [s.block_table[: s.num_computed // self.block_size] for s in sequences]
        groups = find_groups(full, self.block_size, 0) if self.cascade else []
        if not groups:
            return None
        members = [i for group in groups for i in group.members]
        starts = [0, *accumulate(len(group.members) for group in groups)]
        self.num_members += len(members)
        num_blocks = [group.num_blocks for group in groups]
        return PrefixGroups(
            *(
                torch.tensor(values, dtype=torch.int32, device=self.decoder.device)
                for values in (members, starts, num_blocks)
            )
        )

    def step(self, work: list[tuple[Sequence, int]], **options) -> torch.Tensor:
        batch = self.batch(work, **options)
        with torch.inference_mode():
            # A recorded step's are overwritten by the next.
            logits = self.decoder.forward(batch, self.caches).clone().cpu()
        for sequence, count in work:
            sequence.num_computed += count
        return logits

    def prefill(self, sequences: list[Sequence], chunk: int | None) -> list[torch.Tensor]:
        """Computes whole prompts together, ``chunk`` tokens of each at a time.

        Returns each sequence's logits [tokens computed here, V].
        """
        logits: list[list[torch.Tensor]] = [[] for _ in sequences]
        while True:
            work = []
            for index, sequence in enumerate(sequences):
                left = len(sequence.tokens) - sequence.num_computed
                if left:
                    work.append((index, min(left, chunk or left)))
            if not work:
                return [torch.cat(parts) for parts in logits]
            rows = self.step([(sequences[i], count) for i, count in work], all_rows=True)
            parts = rows.split([count for _, count in work])
            for (index, _), part in zip(work, parts, strict=True):
                logits[index].append(part)

    def decode(self, sequences: list[Sequence], first: torch.Tensor, count: int) -> torch.Tensor:
        """Appends ``count`` greedy tokens to each sequence, the first drawn from ``first`` [R, V].

        Returns the logits that each of them was drawn from, [R, count, V].
        """
        drawn_from = [first]
        for step in range(count):
            for sequence, token in zip(sequences, drawn_from[-1].argmax(-1).tolist(), strict=True):
                sequence.tokens.append(token)
            if step < count - 1:
                drawn_from.append(self.step([(sequence, 1) for sequence in sequences]))
        return torch.stack(drawn_from, dim=1)
