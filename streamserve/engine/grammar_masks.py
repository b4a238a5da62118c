"""Which tokens may come next, for the requests whose answers follow a grammar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from streamserve.core.plan import SchedulerOutput
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

    __slots__ = ("_cpu_s", "_has_ended", "_matcher", "_num_consumed", "_num_masks", "_request")

    def __init__(self, request: Request, matcher: LLMatcher, first: int = 0) -> None:
        """The grammar's sentence begins with the ``first``-th output token."""
        self._request = request
        self._matcher = matcher
        self._num_consumed = first
        self._has_ended = False
        self._num_masks = 0
        self._cpu_s = 0.0

    @property
    def is_needed(self) -> bool:
        """Whether the request goes on: it may have ended while a step has it."""
        return not self._request.is_finished

    def knows(self, output_position: int) -> bool:
        """Whether the host knows every output id before this position."""
        return self._request.num_output_tokens >= output_position

    def mask(self) -> bytes:
        """A bit per token, lowest first, 1 where it may follow the output. Raises GrammarError.

        Once the grammar is satisfied the ids that end the request may come. Before ``min_tokens``
        they may not, unless nothing else may: an answer that is whole cannot be longer.
        """
        started = time.thread_time()
        self._consume()
        matcher = self._matcher
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(matcher.get_error().partition("\n")[0])
        params = self._request.sampling_params
        is_early = self._request.num_output_tokens < params.min_tokens
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

    def _consume(self) -> None:
        request = self._request
        first = request.num_prompt_tokens + self._num_consumed
        for token_id in request.token_ids[first:]:
            self._num_consumed += 1
            # Behind the end there are only more of the ids that end: min_tokens or ignore_eos.
            self._has_ended |= token_id in request.eos_token_ids
            if self._has_ended:
                continue
            if token_id in request.ending_ids and not self._matcher.validate_tokens([token_id]):
                self._has_ended = True
            elif not self._matcher.consume_token(token_id):
                raise GrammarError(self._matcher.get_error().partition("\n")[0])


class GrammarMasks:
    """The matchers of live requests. Event-loop thread only."""

    def __init__(self, token_bytes: Callable[[int], bytes], vocab_size: int) -> None:
        self._token_bytes = token_bytes
        self._vocab_size = vocab_size
        self._matchers: dict[str, MaskSource] = {}

    def __bool__(self) -> bool:
        return bool(self._matchers)

    def add(self, request: Request, matcher: LLMatcher | None) -> None:
        """Follow a request from its first output token, or from the end of its thoughts."""
        new_grammar = None if matcher is None else partial(RequestMatcher, request, matcher)
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

    def drop(self, request_id: str) -> None:
        """Forget a request that has ended, if it had a grammar."""
        self._matchers.pop(request_id, None)

    def are_known(self, plan: SchedulerOutput) -> bool:
        """Whether the ids that the plan's masks depend on have come from the device."""
        return all(matcher.knows(position) for _, position, matcher in self._needed(plan))

    def fill(self, plan: SchedulerOutput) -> tuple[dict[str, bytes], dict[str, GrammarError]]:
        """Masks by request id, and the requests whose grammar has failed instead."""
        masks: dict[str, bytes] = {}
        failed: dict[str, GrammarError] = {}
        for request_id, _, matcher in self._needed(plan):
            try:
                if (mask := matcher.mask()) is not None:
                    masks[request_id] = mask
            except GrammarError as error:
                failed[request_id] = error
        return masks, failed

    def _needed(self, plan: SchedulerOutput) -> Iterator[tuple[str, int, MaskSource]]:
        for scheduled in plan.scheduled:
            matcher = self._matchers.get(scheduled.request_id)
            if matcher is not None and scheduled.sample and matcher.is_needed:
                yield scheduled.request_id, scheduled.output_position, matcher


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
