"""How far requests have come that have no token yet: for readers that want to be told."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from streamserve.core.clock import Clock
from streamserve.core.request import Request, RequestStatus

_REFRESH_S = 0.1


class RequestProgress(NamedTuple):
    """``place`` in the queue: 1 is served next, 0 has a seat. Tokens are those of the prompt."""

    place: int
    num_computed_tokens: int
    num_prompt_tokens: int


class _HasRequests(Protocol):
    @property
    def request(self) -> Request: ...
    @property
    def requests(self) -> Sequence[Request]: ...


class ProgressBoard:
    """Looks things up in the engine's live requests, and only when asked.

    The queue's order is sorted anew at most every tenth of a second, however many ask.
    """

    def __init__(self, live: Mapping[str, _HasRequests], clock: Clock) -> None:
        self._live = live
        self._clock = clock
        self._waiting_keys: list[tuple[float, ...]] = []
        self._made_at = float("-inf")

    def of(self, request_id: str) -> RequestProgress | None:
        """Where the request stands, ``None`` if it has ended."""
        live = self._live.get(request_id)
        if live is None:
            return None
        request = live.request
        place = 1 + bisect_left(self._keys(), request.sort_key) if _is_waiting(request) else 0
        num_computed = min(request.num_computed_tokens, request.num_prompt_tokens)
        return RequestProgress(place, num_computed, request.num_prompt_tokens)

    def _keys(self) -> list[tuple[float, ...]]:
        now = self._clock()
        if now - self._made_at >= _REFRESH_S:
            self._made_at = now
            lives = dict.fromkeys(self._live.values())  # a beam search has many ids
            requests = (request for live in lives for request in live.requests)
            self._waiting_keys = sorted(r.sort_key for r in requests if _is_waiting(r))
        return self._waiting_keys


def _is_waiting(request: Request) -> bool:
    return request.status in {RequestStatus.WAITING, RequestStatus.PREEMPTED}
