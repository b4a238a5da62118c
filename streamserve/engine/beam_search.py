"""Beam search: which sequences go on, which are done, and when to stop. No request, no device.

It is transformers' (``generate(num_beams=…)``, since 4.50). In each round every running sequence
has candidates for its next token:

    all candidates by score: the sum of their logprobs
    |<- the best beam_width ->|<- the rest ... ->|
      those that end: finished     never finished
      those that do not end, from here on down: the beam_width that run on

A sequence that ends outside the best ``beam_width`` is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from streamserve.core.plan import TokenLogprobs
from streamserve.core.sampling_params import BeamSearchParams


class Continuation(NamedTuple):
    """A sequence that runs on: with ``token_id`` behind that of the running one at ``parent``."""

    parent: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sequence of the answer. ``score`` is the sum of its logprobs."""

    entries: list[TokenLogprobs]
    score: float
    has_ended: bool = False  # by its last token, not by its length

    @property
    def token_ids(self) -> list[int]:
        """The answer's tokens, the one that ended it among them."""
        return [entry.token_id for entry in self.entries]


class _Candidate(NamedTuple):
    score: float
    parent: int
    token_id: int
    logprob: float


class BeamSearch:
    """One search. Begins with one running sequence, the prompt."""

    def __init__(
        self,
        params: BeamSearchParams,
        *,
        ending_ids: frozenset[int],
        max_tokens: int,
        min_tokens: int = 0,
        num_top: int = 0,
    ) -> None:
        """``num_top``: alternatives that the answer's logprobs keep at each position."""
        self._params = params
        self._ending_ids = ending_ids
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._num_top = num_top
        self._finished: list[tuple[float, Hypothesis]] = []  # by falling final score
        self.running = [Hypothesis([], 0.0)]

    @staticmethod
    def num_candidates(params: BeamSearchParams, ending_ids: frozenset[int]) -> int:
        """Likeliest tokens that `advance` needs of each sequence: enough do not end it."""
        return params.beam_width + len(ending_ids)

    def advance(self, rows: Sequence[TokenLogprobs]) -> list[Continuation]:
        """Extend every running sequence; ``rows[i].top`` are what may follow the ``i``-th.

        Returns how the new running ones come out of the old, best first; none: the search is over.
        """
        width = self._params.beam_width
        num_tokens = len(self.running[0].entries) + 1
        candidates = self._candidates(rows, num_tokens)
        is_last = num_tokens == self._max_tokens
        going_on = (
            [] if is_last else [c for c in candidates if c.token_id not in self._ending_ids][:width]
        )
        done = [c for c in candidates[:width] if is_last or c.token_id in self._ending_ids]
        self._finish([self._extended(c, rows) for c in done], num_tokens)
        self.running = [self._extended(c, rows) for c in going_on]
        if not self.running or not self._may_improve(num_tokens):
            return []
        return [Continuation(c.parent, c.token_id) for c in going_on]

    def best(self, count: int) -> list[Hypothesis]:
        """The best ``count`` sequences of a search that is over, by falling final score."""
        return [hypothesis for _, hypothesis in self._finished[:count]]

    def _candidates(self, rows: Sequence[TokenLogprobs], num_tokens: int) -> list[_Candidate]:
        may_end = num_tokens > self._min_tokens
        found = [
            _Candidate(hypothesis.score + logprob, parent, token_id, logprob)
            for parent, (hypothesis, row) in enumerate(zip(self.running, rows, strict=True))
            for token_id, logprob in row.top
            if may_end or token_id not in self._ending_ids
        ]
        found.sort(key=lambda c: (-c.score, c.parent, c.token_id))
        return found

    def _extended(self, candidate: _Candidate, rows: Sequence[TokenLogprobs]) -> Hypothesis:
        score, parent, token_id, logprob = candidate
        top = rows[parent].top[: self._num_top]
        return Hypothesis(
            [*self.running[parent].entries, TokenLogprobs(token_id, logprob, top)],
            score,
            token_id in self._ending_ids,
        )

    def _finish(self, hypotheses: list[Hypothesis], num_tokens: int) -> None:
        width = self._params.beam_width
        penalty = float(num_tokens) ** self._params.length_penalty
        self._finished += [(h.score / penalty, h) for h in hypotheses]
        self._finished.sort(key=lambda scored: -scored[0])
        del self._finished[width:]

    def _may_improve(self, num_tokens: int) -> bool:
        """Whether what runs could still be better than what has finished."""
        params = self._params
        if len(self._finished) < params.beam_width:
            return True
        if params.early_stopping is True:
            return False
        at_its_longest = params.early_stopping == "never" and params.length_penalty > 0.0
        length = float(self._max_tokens if at_its_longest else num_tokens)
        best_possible: float = self.running[0].score / length**params.length_penalty
        return best_possible > self._finished[-1][0]
