"""A draft head in a paged cache, fed and asked as a runner does, and compared with a judge."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from streamserve.models import DraftHead
from streamserve.models.head_decoder import HeadDecoder
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

    def step(self, work, states, *, all_rows: bool = True) -> tuple[Tensor, Tensor]:
        """``states`` are those of each sequence's next tokens, one beside the other.

        Returns what the head did.
        """
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
        return tokens, found

    def feed(
        self, sequences: list[Sequence], states: list[torch.Tensor], chunk: int, **options: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """All of their tokens, in chunks, the sequences together."""
        steps = []
        while any(s.num_computed < len(s.tokens) for s in sequences):
            work, rows = [], []
            for sequence, given in zip(sequences, states, strict=True):
                start = sequence.num_computed
                if count := min(chunk, len(sequence.tokens) - start):
                    work.append((sequence, count))
                    rows.append(given[start : start + count])
            steps.append(self.step(work, rows, **options))
        return steps

    def go_on(
        self, sequences: list[Sequence], tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Guesses on from what was found, behind ``tokens`` if not behind its own."""
        for i, sequence in enumerate(sequences):
            token = self.tokens[id(sequence)][-1] if tokens is None else int(tokens[i])
            sequence.tokens.append(token)
        own = [self.found[id(sequence)][-1][None] for sequence in sequences]
        return self.step([(sequence, 1) for sequence in sequences], own)


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
    for _ in range(NUM_GUESSES):
        guesses.go_on(sequences)
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


def check_recorded(judge: Judge, head: HeadDecoder) -> None:
    """A recorded guess is that of functions one by one: what it finds bit for bit.

    The functions round their logits, a recorded guess does not: of those that round to the same it
    may prefer another.
    """
    texts, given = judge_states(judge)

    def run(guesses: Guesses, tokens: list[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        sequences = [Sequence(text.tokens) for text in texts]
        # Most chunks ask for no guess; what a guess has found must outlive the next.
        steps = guesses.feed(sequences, given, 2, all_rows=False)
        return steps + [guesses.go_on(sequences, tokens[i]) for i in range(NUM_GUESSES)]

    product, logits = head._head, []
    names = getattr(head, "_target_ids", None)  # of its rows, where they are not all

    def watched(rows: Tensor) -> Tensor:
        logits.append(product(rows))
        return logits[-1]

    head._head = watched
    functions = Guesses(head, block_size=16)
    expected = run(functions, [None] * NUM_GUESSES)
    head._head = product

    recorded = Guesses(head, block_size=16)
    assert head.record(recorded.harness.caches, max_tokens=64, max_logits=8) > 4
    guessed = torch.tensor(list(functions.tokens.values()))  # of each sequence
    found = run(recorded, list(guessed[:, :NUM_GUESSES].t()))
    for (tokens, states), (_, theirs), of_rows in zip(found, expected, logits, strict=True):
        assert torch.equal(states, theirs)
        for token, row in zip(tokens, of_rows, strict=True):
            likeliest = (row == row.max()).nonzero()[:, 0]
            assert token in (likeliest if names is None else names[likeliest])
