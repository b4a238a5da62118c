"""Which tokens may come next, for the requests whose answers follow a grammar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from streamserve.core.forced import FindForced
from streamserve.core.plan import Masks, ScheduledRequest, SchedulerOutput
from streamserve.core.request import Request
from streamserve.engine.thinking_masks import MaskSource, ThinkingMatcher

if TYPE_CHECKING:
    from llguidance import LLMatcher

_MAX_MASK_S = 0.01  # of processor time, on average
_NUM_FREE_MASKS = 20  # so many may be as slow before that is an error


class GrammarError(Exception):
    """A grammar cannot go on: the message is for the log and for the client."""


class RequestMatcher:
    """One request's place in its grammar: a function of its output ids, read when asked.

    So it does not matter in which steps they came, or whether the request was preempted meanwhile.
    """

    __slots__ = (
        "_ahead",
        "_cpu_s",
        "_ended_at",
        "_first",
        "_matcher",
        "_num_known",
        "_num_masks",
        "_request",
    )

    def __init__(self, request: Request, matcher: LLMatcher, first: int = 0) -> None:
        """The grammar's sentence begins with the ``first``-th output token."""
        self._request = request
        self._matcher = matcher
        self._first = first
        self._num_known = 0  # output tokens from there on that were read
        self._ahead: list[int] = []  # behind them: what was supposed
        self._ended_at: int | None = None  # which of all these is not the grammar's any more
        self._num_masks = 0
        self._cpu_s = 0.0

    @property
    def is_needed(self) -> bool:
        """Whether the request goes on: it may have ended while a step has it."""
        return not self._request.is_finished

    def knows(self, output_position: int) -> bool:
        """Whether the host knows every output id before this position."""
        return self._request.num_output_tokens >= output_position

    def mask(self, ahead: Sequence[int] = ()) -> bytes:
        """See `MaskSource`. Raises GrammarError.

        Once the grammar is satisfied the ids that end the request may come. Before ``min_tokens``
        they may not, unless nothing else may: an answer that is whole cannot be longer.
        """
        started = time.thread_time()
        self._follow(ahead)
        matcher = self._matcher
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(matcher.get_error().partition("\n")[0])
        params = self._request.sampling_params
        is_early = self._request.num_output_tokens + len(ahead) < params.min_tokens
        if params.stop_token_ids and matcher.is_accepting():
            mask = _with_bits(mask, params.stop_token_ids)
        if is_early and matcher.is_accepting():
            longer = _without_bits(mask, self._request.ending_ids | self._request.eos_token_ids)
            mask = longer if any(longer) else mask
        self._num_masks += 1
        self._cpu_s += time.thread_time() - started
        if self._cpu_s > _MAX_MASK_S * (self._num_masks + _NUM_FREE_MASKS):
            raise GrammarError(f"a token takes more than {_MAX_MASK_S * 1e3:g} ms to find")
        return mask

    def forced(self, limit: int) -> list[int]:
        """See `MaskSource`."""
        try:
            self._follow(())
        except GrammarError:
            return []  # the next mask says so
        return [] if self._ended_at is not None else self._matcher.compute_ff_tokens()[:limit]

    def _follow(self, ahead: Sequence[int]) -> None:
        """Go to where the grammar is behind the output and ``ahead``.

        From where it was before: drafts that were right need not be taken again.
        """
        request = self._request
        first = self._first + self._num_known
        known = request.token_ids[request.num_prompt_tokens + first :]
        path = [*known, *ahead[max(first - request.num_output_tokens, 0) :]]
        num_same = min(len(self._ahead), len(path))
        while self._ahead[:num_same] != path[:num_same]:
            num_same -= 1
        self._go_back(len(self._ahead) - num_same)
        for token_id in path[num_same:]:
            self._take(token_id)
        self._num_known += len(known)
        del self._ahead[: len(known)]

    def _go_back(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        del self._ahead[-num_tokens:]
        end = self._num_known + len(self._ahead)
        num_taken = num_tokens
        if self._ended_at is not None:
            num_taken = max(self._ended_at - end, 0)
            if self._ended_at >= end:
                self._ended_at = None
        if num_taken and not self._matcher.rollback(num_taken):
            raise GrammarError(self._matcher.get_error().partition("\n")[0])

    def _take(self, token_id: int) -> None:
        request, matcher = self._request, self._matcher
        # Behind the end there are only more of the ids that end: min_tokens or ignore_eos.
        if self._ended_at is None and (
            token_id in request.eos_token_ids
            or (token_id in request.ending_ids and not matcher.validate_tokens([token_id]))
        ):
            self._ended_at = self._num_known + len(self._ahead)
        if self._ended_at is None and not matcher.consume_token(token_id):
            raise GrammarError(matcher.get_error().partition("\n")[0])
        self._ahead.append(token_id)


class GrammarMasks:
    """The matchers of live requests. Event-loop thread only."""

    def __init__(self, token_bytes: Callable[[int], bytes], vocab_size: int) -> None:
        self._token_bytes = token_bytes
        self._vocab_size = vocab_size
        self._matchers: dict[str, MaskSource] = {}

    def __bool__(self) -> bool:
        return bool(self._matchers)

    def add(self, request: Request, matcher: LLMatcher | None) -> FindForced:
        """Follow a request from its first output token, or from the end of its thoughts.

        Returns what finds the tokens that must come.
        """
        new_grammar: Callable[[int], MaskSource] | None = None
        if matcher is not None:
            new_grammar = partial(_new_matcher, request, matcher)
        thinking = request.sampling_params.thinking
        source: MaskSource
        if thinking is not None:
            source = ThinkingMatcher(
                request, thinking, new_grammar, self._token_bytes, self._vocab_size
            )
        else:
            assert new_grammar is not None
            source = new_grammar(0)
        self._matchers[request.request_id] = source
        return source.forced

    def drop(self, request_id: str) -> None:
        """Forget a request that has ended, if it had a grammar."""
        self._matchers.pop(request_id, None)

    def are_known(self, plan: SchedulerOutput) -> bool:
        """Whether the ids that the plan's masks depend on have come from the device."""
        return all(matcher.knows(s.output_position) for s, matcher in self._needed(plan))

    def fill(self, plan: SchedulerOutput) -> tuple[Masks, dict[str, GrammarError]]:
        """Masks by request id, and the requests whose grammar has failed instead."""
        masks: dict[str, bytes | list[bytes | None]] = {}
        failed: dict[str, GrammarError] = {}
        for scheduled, matcher in self._needed(plan):
            try:
                mask = matcher.mask()
                if scheduled.sample > 1:
                    masks[scheduled.request_id] = _masks_behind(scheduled, matcher, mask)
                elif mask is not None:
                    masks[scheduled.request_id] = mask
            except GrammarError as error:
                failed[scheduled.request_id] = error
        return masks, failed

    def _needed(self, plan: SchedulerOutput) -> Iterator[tuple[ScheduledRequest, MaskSource]]:
        for scheduled in plan.scheduled:
            matcher = self._matchers.get(scheduled.request_id)
            if matcher is not None and scheduled.sample and matcher.is_needed:
                yield scheduled, matcher


def _new_matcher(request: Request, matcher: LLMatcher, first: int) -> RequestMatcher:
    return RequestMatcher(request, matcher.deep_copy(), first)


def _masks_behind(
    scheduled: ScheduledRequest, matcher: MaskSource, first: bytes | None
) -> list[bytes | None]:
    """The mask of each sample of a request with drafts: ``first``, and those behind the drafts.

    Behind one that may not come nothing counts, whatever it is.
    """
    drafts = scheduled.token_ids[1 - scheduled.sample :]
    masks = [first]
    for i, draft in enumerate(drafts):
        before = masks[-1]
        if before is not None and not _allows(before, draft):
            break
        masks.append(matcher.mask(drafts[: i + 1]))
    return masks + [None] * (scheduled.sample - len(masks))


def _allows(mask: bytes, token_id: int) -> bool:
    return token_id >> 3 < len(mask) and bool(mask[token_id >> 3] >> (token_id & 7) & 1)


def _with_bits(mask: bytes, token_ids: tuple[int, ...]) -> bytes:
    more = bytearray(mask)
    for token_id in token_ids:
        if token_id >> 3 < len(more):
            more[token_id >> 3] |= 1 << (token_id & 7)
    return bytes(more)


def _without_bits(mask: bytes, token_ids: frozenset[int]) -> bytes:
    fewer = bytearray(mask)
    for token_id in token_ids:
        if token_id >> 3 < len(fewer):
            fewer[token_id >> 3] &= ~(1 << (token_id & 7))
    return bytes(fewer)
