"""The few shapes that a step may have on a device: what graphs are captured for.

A step is padded to the next shape of a ladder, so that every launch of it was met at warm-up and
nothing compiles later. Padding rows have id 0, slot -1 and belong to no sequence; padding sequences
have no tokens. Both cost little: a step of a few rows waits for the weights.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain, product
from typing import NamedTuple

_SMALL_DECODES = (1, 2, 4)
# Sizes of decodes too, so that products meet no other number of rows.
_DRAFTING_TOKENS = (4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
_MIXED_TOKENS = (64, 128, 192, 256, 384, 512)
_MIXED_SEQS = (16, 64)
LARGEST_MIXED_GRAPH = 1024
"""Above it the device works longer on a step than the host needs to launch it, many times over."""


class StepKey(NamedTuple):
    """A padded shape: T tokens of R sequences, of which R rows get logits.

    Where T = R that is every row: each sequence has one token, or some and each of them is sampled.
    """

    num_tokens: int
    num_seqs: int
    max_query_len: int  # tokens of a sequence
    has_groups: bool  # sequences that share leading blocks are attended to together
    num_adapters: int = 0  # slots of adapters that rows may have; 0: no row has one

    @property
    def is_decode(self) -> bool:
        """Whether each sequence has one token."""
        return self.max_query_len == 1

    @property
    def has_all_logits(self) -> bool:
        """Whether every token gets logits, in their order."""
        return self.num_tokens == self.num_seqs


class StepLadder:
    """All shapes for steps of up to ``max_num_batched_tokens`` of ``max_num_seqs`` sequences.

    ``decode_sizes`` replaces the sizes of decodes; the largest batch is always among them. With
    ``num_adapters`` slots there is each shape once more, for steps in which rows have adapters.
    Where a sequence may have ``num_drafts``, there are shapes for decodes with drafts, and up to
    ``max_num_sampled`` rows get logits.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        *,
        decode_sizes: Sequence[int] | None = None,
        with_groups: bool = True,
        num_adapters: int = 0,
        num_drafts: int = 0,
        max_num_sampled: int = 0,
    ) -> None:
        max_rows = max(max_num_seqs, max_num_sampled)
        chosen = _decode_sizes(max_num_seqs) if decode_sizes is None else decode_sizes
        self.decode_sizes = tuple(sorted({n for n in chosen if n < max_num_seqs} | {max_num_seqs}))
        self.num_drafts = num_drafts
        drafting = (*(n for n in _DRAFTING_TOKENS if n < max_rows), max_rows)
        self._drafting_tokens = drafting if num_drafts else ()
        self.mixed_seqs = (*(n for n in _MIXED_SEQS if n < max_rows), max_rows)
        self.mixed_tokens = tuple(_mixed_tokens(max(max_num_batched_tokens, max_rows + 1)))
        self._has_groups = (False, True) if with_groups and max_num_seqs > 1 else (False,)
        self._num_adapters = (0, num_adapters) if num_adapters else (0,)

    @property
    def largest(self) -> StepKey:
        """The shape that needs the most memory."""
        tokens = self.mixed_tokens[-1]
        seqs, both = self.mixed_seqs[-1], (self._has_groups[-1], self._num_adapters[-1])
        return StepKey(tokens, seqs, tokens, *both)

    def key(
        self,
        num_tokens: int,
        num_seqs: int,
        *,
        num_sampled: int = 0,
        has_groups: bool = False,
        has_adapters: bool = False,
    ) -> StepKey:
        """The least shape that a step of ``num_seqs`` sequences, one token or more each, fits.

        ``num_sampled`` of the tokens are sampled: more than one of a sequence that has drafts.
        """
        num_adapters = self._num_adapters[-1] if has_adapters else 0
        if num_tokens == num_seqs:
            size = self.decode_sizes[bisect_left(self.decode_sizes, num_seqs)]
            return StepKey(size, size, 1, has_groups, num_adapters)
        if self.num_drafts and num_sampled == num_tokens:
            size = self._drafting_tokens[bisect_left(self._drafting_tokens, num_tokens)]
            return StepKey(size, size, self._max_query_len(size), has_groups, num_adapters)
        seqs = self.mixed_seqs[bisect_left(self.mixed_seqs, max(num_seqs, num_sampled))]
        # As many rows of logits as tokens would mean that all tokens get them, in their order.
        tokens = self.mixed_tokens[bisect_left(self.mixed_tokens, max(num_tokens, seqs + 1))]
        return StepKey(tokens, seqs, tokens, has_groups, num_adapters)

    def decodes(self) -> Iterator[StepKey]:
        """Decodes, the smallest first."""
        for size in self.decode_sizes:
            for has_groups in self._has_groups[: 1 if size == 1 else 2]:
                for num_adapters in self._num_adapters:
                    yield StepKey(size, size, 1, has_groups, num_adapters)

    def drafting(self) -> Iterator[StepKey]:
        """Decodes of which some have drafts, the smallest first."""
        for size in self._drafting_tokens:
            for both in product(self._has_groups, self._num_adapters):
                yield StepKey(size, size, self._max_query_len(size), *both)

    def mixed(self) -> Iterator[StepKey]:
        """Steps with parts of prompts in them, the smallest first."""
        for tokens in self.mixed_tokens:
            for seqs in self.mixed_seqs:
                if seqs < tokens:
                    for both in product(self._has_groups, self._num_adapters):
                        yield StepKey(tokens, seqs, tokens, *both)

    def shapes(self) -> Iterator[StepKey]:
        """All of them."""
        return chain(self.decodes(), self.drafting(), self.mixed())

    def graphs(self) -> Iterator[StepKey]:
        """What is worth a graph, the most urgent first."""
        yield from self.decodes()
        yield from self.drafting()
        yield from (key for key in self.mixed() if key.num_tokens <= LARGEST_MIXED_GRAPH)

    def _max_query_len(self, num_tokens: int) -> int:
        """Of a decode with drafts among so many tokens."""
        return min(num_tokens, 1 + self.num_drafts)


def _decode_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, multiples of 8 up to 64, then steps of a quarter of the last power of two."""
    sizes = [*_SMALL_DECODES, 8]
    while sizes[-1] < max_num_seqs:
        last = sizes[-1]
        sizes.append(last + (8 if last < 64 else 1 << (last.bit_length() - 3)))
    return sizes


def _mixed_tokens(max_tokens: int) -> Iterator[int]:
    """Rungs an eighth to a third apart, multiples of 64; the top reaches ``max_tokens``."""
    for size in _MIXED_TOKENS:
        yield size
        if size >= max_tokens:
            return
    size = _MIXED_TOKENS[-1]
    while size < max_tokens:
        size += 128 if size < 1024 else 256 if size < 2048 else 512
        yield size
