"""Masks of an answer that thinks first: none while it does, then its grammar's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import Protocol

from streamserve.core.request import Request
from streamserve.core.thinking import Thinking
from streamserve.engine.parsers.reasoning import ReasoningTokens, ThinkState


class MaskSource(Protocol):
    """What is behind a request's masks: a function of its output ids, read when asked.

    So it does not matter in which steps they came, or whether the request was preempted meanwhile.
    """

    @property
    def is_needed(self) -> bool:
        """Whether there may be masks from here on."""

    def knows(self, output_position: int) -> bool:
        """Whether the host knows the output ids that the mask of this position depends on."""

    def mask(self, ahead: Sequence[int] = ()) -> bytes | None:
        """A bit per token, lowest first, 1 where it may follow the output; ``None``: any may.

        ``ahead`` are tokens that are supposed to come behind the known ones; each may.
        """

    def forced(self, limit: int) -> list[int]:
        """At most so many tokens that follow the output whatever the model says. Never raises."""


class _Bridge:
    """From the end of thoughts, at the output position ``first``, to what comes behind them."""

    def __init__(
        self,
        request: Request,
        thinking: Thinking,
        first: int,
        new_grammar: Callable[[int], MaskSource] | None,
        vocab_size: int,
    ) -> None:
        self._request = request
        self._ids = thinking.next_token_ids
        self._not_next = thinking.not_next
        self._first = first
        self._vocab_size = vocab_size
        self._grammar = None if new_grammar is None else new_grammar(first + len(self._ids))

    @property
    def is_needed(self) -> bool:
        is_past = self._request.num_output_tokens > self._first + len(self._ids)
        return self._grammar is not None or not is_past

    def knows(self, output_position: int) -> bool:
        return self._request.num_output_tokens >= output_position

    def mask(self, ahead: Sequence[int] = ()) -> bytes | None:
        position = self._request.num_output_tokens + len(ahead) - self._first
        if position < len(self._ids):
            return _only(self._ids[position], self._vocab_size)
        if self._grammar is not None:
            return self._grammar.mask(ahead)
        if position == len(self._ids) and self._not_next is not None:
            return _all_but((self._not_next,), self._vocab_size)
        return None

    def forced(self, limit: int) -> list[int]:
        position = self._request.num_output_tokens - self._first
        if position < len(self._ids):
            return list(self._ids[position:][:limit])
        return [] if self._grammar is None else self._grammar.forced(limit)


def _only(token_id: int, vocab_size: int) -> bytes:
    mask = bytearray(-(-vocab_size // 8))
    mask[token_id >> 3] = 1 << (token_id & 7)
    return bytes(mask)


def _all_but(token_ids: Iterable[int], vocab_size: int) -> bytes:
    mask = bytearray(b"\xff" * -(-vocab_size // 8))
    for token_id in token_ids:
        mask[token_id >> 3] &= ~(1 << (token_id & 7))
    return bytes(mask)


class ThinkingMatcher:
    """One request's place in its thoughts, and behind them in its grammar, if it has one."""

    __slots__ = (
        "_behind",
        "_budget",
        "_exhausted_at",
        "_free",
        "_has_thought",
        "_instead",
        "_new_grammar",
        "_num_read",
        "_request",
        "_thinking",
        "_tokens",
        "_vocab_size",
    )

    def __init__(
        self,
        request: Request,
        thinking: Thinking,
        new_grammar: Callable[[int], MaskSource] | None,
        token_bytes: Callable[[int], bytes],
        vocab_size: int,
    ) -> None:
        """``new_grammar`` makes what masks the output from some position on."""
        self._request = request
        self._thinking = thinking
        self._new_grammar = new_grammar
        self._vocab_size = vocab_size
        state = ThinkState.INSIDE if thinking.is_open else ThinkState.UNDECIDED
        self._tokens = ReasoningTokens(state, token_bytes, start=thinking.start, end=thinking.end)
        self._budget = thinking.budget
        self._num_read = 0  # output tokens
        self._exhausted_at: int | None = None  # the output position at which the end begins
        self._behind: MaskSource | None = None  # what masks from the end of the thoughts on
        self._has_thought = thinking.is_open
        self._instead: MaskSource | None = None  # of thoughts, while they may begin or not
        may_do_without = thinking.is_optional and len(thinking.start_token_ids) == 1
        if new_grammar is not None and may_do_without and not thinking.is_open:
            self._instead = new_grammar(0)
        self._free = None if new_grammar is None else self._without_ends()

    @property
    def is_needed(self) -> bool:
        behind = self._behind
        is_done = self._tokens.is_over and (behind is None or not behind.is_needed)
        return not (is_done or self._request.is_finished)

    def knows(self, output_position: int) -> bool:
        # A budget is looked at when it may be used up: until then no step waits for ids.
        if (
            self._new_grammar is None
            and self._budget is not None
            and output_position < self._budget
            and not self._thinking.next_token_ids
        ):
            return True
        return self._request.num_output_tokens >= output_position

    def mask(self, ahead: Sequence[int] = ()) -> bytes | None:
        self._read_known()
        if not ahead or self._behind is not None:
            return self._mask(ahead)
        branch = copy(self)
        branch._tokens = self._tokens.copy()
        branch._read(ahead)
        return branch._mask(ahead)

    def forced(self, limit: int) -> list[int]:
        self._read_known()
        if self._behind is not None:
            return self._behind.forced(limit)
        if self._instead is not None and not self._has_thought:
            return []  # thoughts may come, too, or it has begun without
        return list(self._forced_ids(self._request.num_output_tokens)[:limit])

    def _mask(self, ahead: Sequence[int]) -> bytes | None:
        if self._behind is not None:
            return self._behind.mask(ahead)
        if self._instead is not None and not self._has_thought:
            return self._mask_without_thoughts(self._instead, ahead)
        forced = self._forced_ids(self._request.num_output_tokens + len(ahead))
        return _only(forced[0], self._vocab_size) if forced else self._free

    def _mask_without_thoughts(self, grammar: MaskSource, ahead: Sequence[int]) -> bytes | None:
        """The grammar's, and at the very beginning that of thoughts as well."""
        mask, position = grammar.mask(ahead), self._request.num_output_tokens + len(ahead)
        if mask is None or position:
            return mask
        start = self._thinking.start_token_ids[0]
        both = bytearray(mask)
        both[start >> 3] |= 1 << (start & 7)
        return bytes(both)

    def _without_ends(self) -> bytes:
        """Where a grammar follows, an answer must not end in its thoughts."""
        return _all_but(self._request.ending_ids | self._request.eos_token_ids, self._vocab_size)

    def _read_known(self) -> None:
        request = self._request
        self._read(request.token_ids[request.num_prompt_tokens + self._num_read :])

    def _read(self, token_ids: Sequence[int]) -> None:
        request, tokens = self._request, self._tokens
        for token_id in token_ids:
            if tokens.is_over:
                break
            self._look_at_budget()
            tokens.feed((token_id,))
            self._num_read += 1
            self._has_thought |= tokens.is_inside
        self._look_at_budget()
        if not tokens.is_over or self._behind is not None:
            return
        if self._thinking.next_token_ids and self._has_thought:
            self._behind = _Bridge(
                request, self._thinking, self._num_read, self._new_grammar, self._vocab_size
            )
        elif self._new_grammar is not None:
            is_late = self._instead is None or self._has_thought
            self._behind = self._new_grammar(self._num_read) if is_late else self._instead

    def _look_at_budget(self) -> None:
        if self._budget is None or self._exhausted_at is not None:
            return
        if self._tokens.is_inside and self._tokens.count >= self._budget:
            self._exhausted_at = self._num_read

    def _forced_ids(self, position: int) -> tuple[int, ...]:
        """What must come at this output position and behind it."""
        thinking = self._thinking
        ids: tuple[int, ...] = ()
        if self._tokens.is_over:
            return ()
        if self._exhausted_at is not None:
            ids, position = thinking.end_token_ids, position - self._exhausted_at
        elif self._new_grammar is not None and not thinking.is_open:
            ids = thinking.start_token_ids
        return ids[position:]
