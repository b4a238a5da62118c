"""Policy is one sort key over all live requests, and when one yields to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from streamserve.core.request import Request

SortKey = tuple[float, ...]


class Policy(NamedTuple):
    """In which order requests are served.

    ``key(request, seq)``: the smallest is served first; ``seq`` counts arrivals and breaks ties.
    ``outranks(waiting, running)``: whether a waiting request sorts before a running one by enough
    to take its place when seats, tokens or blocks run out. It must imply a smaller key, and two
    requests must never outrank each other.
    ``overtakes(waiting, running)``: whether a waiting request that finds a seat and blocks gets its
    tokens of the step first. It must imply a smaller key, and be implied by ``outranks``.
    ``looks_up_prefix``: whether ``key`` reads ``Request.num_uncached_tokens``.
    """

    key: Callable[[Request, int], SortKey]
    outranks: Callable[[Request, Request], bool]
    overtakes: Callable[[Request, Request], bool]
    looks_up_prefix: bool = False


AGEING_S_PER_TOKEN = 0.005
"""Of the shortest job first: how long a prompt lets others pass, for each token it has more."""


def _sjf_key(request: Request, seq: int) -> SortKey:
    """Shortest uncached prompt first, with ageing: all age alike, so that the order stands still.

    A request is passed only by those that arrive less than ``AGEING_S_PER_TOKEN`` for each token
    that they are shorter after it.
    """
    aged = request.arrival_time + AGEING_S_PER_TOKEN * request.num_uncached_tokens
    return (aged, request.arrival_time, seq)


def _fcfs_key(request: Request, seq: int) -> SortKey:
    return (request.arrival_time, seq)


def _priority_key(request: Request, seq: int) -> SortKey:
    return (request.priority, request.arrival_time, seq)


def _never(waiting: Request, running: Request) -> bool:
    """Who came first keeps the seat: a yield would only swap one wait for another."""
    return False


def _sorts_before(waiting: Request, running: Request) -> bool:
    """A swap of places within a step costs nothing: no margin."""
    return waiting.sort_key < running.sort_key


def _more_urgent(waiting: Request, running: Request) -> bool:
    """The margin is one priority class."""
    return waiting.priority < running.priority


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "sjf": Policy(_sjf_key, _never, _sorts_before, looks_up_prefix=True),
        "fcfs": Policy(_fcfs_key, _never, _never),
        "priority": Policy(_priority_key, _more_urgent, _more_urgent),
    }
)
