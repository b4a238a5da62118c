"""A draft head in a paged cache, fed and asked as a runner does, and compared with a judge."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from streamserve.models import DraftHead
from tests.models.paged import PagedHarness, Sequence
from tests.models.parity import prompts

NUM_GUESSES = 4


class Judge(Protocol):
    """A head in plain torch. It is given tokens, and the hidden states [T, H] before them."""

    def __call__(self, tokens: list[int], hidden_states: Tensor) -> Tensor: ...
    def likeliest(self, found: Tensor) -> Tensor: ...
    def states_of_target(self, tokens: list[int]) -> Tensor: ...


class Guesses:
    """A head's caches, and what it has found at each position of some sequences."""

    def __init__(self, head: DraftHead, block_size: int = 4) -> None:
        self.harness = PagedHarness(head, block_size=block_size)
        self.head = head
        self.found: dict[int, list[torch.Tensor]] = {}
        self.tokens: dict[int, list[int]] = {}

    def step(self, work, states, *, all_rows: bool = True) -> None:
        """``states`` are those of each sequence's next tokens, one beside the other."""
        batch = self.harness.batch(work, all_rows=all_rows)
        batch = replace(batch, hidden_states=torch.cat(states).to(self.head.dtype))
        with torch.inference_mode():
            tokens, found = self.head.guess(batch, self.harness.caches)
        counts = [c if all_rows else int(s.num_computed + c == len(s.tokens)) for s, c in work]
        parts = zip(work, tokens.split(counts), found.split(counts), strict=True)
        for (sequence, count), of_tokens, rows in parts:
            sequence.num_computed += count
            self.tokens.setdefault(id(sequence), []).extend(of_tokens.tolist())
            self.found.setdefault(id(sequence), []).extend(rows)

    def feed(
        self, sequences: list[Sequence], states: list[torch.Tensor], chunk: int, **options: bool
    ) -> None:
        """All of their tokens, in chunks, the sequences together."""
        while any(s.num_computed < len(s.tokens) for s in sequences):
            work, rows = [], []
            for sequence, given in zip(sequences, states, strict=True):
                start = sequence.num_computed
                if count := min(chunk, len(sequence.tokens) - start):
                    work.append((sequence, count))
                    rows.append(given[start : start + count])
            self.step(work, rows, **options)

    def go_on(self, sequences: list[Sequence], count: int) -> None:
        """Guesses on from what was found."""
        for _ in range(count):
            for sequence in sequences:
                sequence.tokens.append(self.tokens[id(sequence)][-1])
            own = [self.found[id(sequence)][-1][None] for sequence in sequences]
            self.step([(sequence, 1) for sequence in sequences], own)


def judge_states(judge: Judge) -> tuple[list[Sequence], list[torch.Tensor]]:
    """Sequences of the tokens behind each position of prompts, and the states there."""
    texts = [tokens for tokens in prompts(shared=0) if len(tokens) > 1]
    with torch.inference_mode():
        states = [judge.states_of_target(tokens)[:-1] for tokens in texts]
    return [Sequence(tokens[1:]) for tokens in texts], states


def check(judge: Judge, head: DraftHead, chunk: int, tolerance: float) -> None:
    """In chunks, all sequences together, and then on from its own states."""
    sequences, states = judge_states(judge)
    guesses = Guesses(head)
    guesses.feed(sequences, states, chunk)
    guesses.go_on(sequences, NUM_GUESSES)
    for sequence, given in zip(sequences, states, strict=True):
        found = torch.stack(guesses.found[id(sequence)])
        with torch.inference_mode():
            expected = given[:0]
            for _ in range(NUM_GUESSES + 1):
                # What it has found at the last positions stands in for the target's states there.
                inputs = torch.cat((given, expected[len(given) - 1 : len(expected)]))
                expected = judge(sequence.tokens[: len(inputs)], inputs)
            tokens = judge.likeliest(expected).tolist()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert guesses.tokens[id(sequence)] == tokens


def check_recorded(judge: Judge, head: DraftHead) -> None:
    """A recorded guess is that of functions one by one, bit for bit."""
    found = []
    texts, states = judge_states(judge)  # once: sums of another order round to other inputs
    for is_recorded in (False, True):
        sequences = [Sequence(list(text.tokens)) for text in texts]
        guesses = Guesses(head, block_size=16)
        if is_recorded:
            assert head.record(guesses.harness.caches, max_tokens=64, max_logits=8) > 4
        # Most chunks ask for no guess; what a guess has found must outlive the next.
        guesses.feed(sequences, states, 2, all_rows=False)
        guesses.go_on(sequences, NUM_GUESSES)
        found.append([(guesses.tokens[id(s)], guesses.found[id(s)]) for s in sequences])
    for one, other in zip(*found, strict=True):
        assert one[0] == other[0]
        assert len(one[0]) == 1 + NUM_GUESSES
        assert torch.equal(torch.stack(one[1]), torch.stack(other[1]))
