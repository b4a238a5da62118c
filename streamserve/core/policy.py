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
    """

    key: Callable[[Request, int], SortKey]
    outranks: Callable[[Request, Request], bool]


def _fcfs_key(request: Request, seq: int) -> SortKey:
    return (request.arrival_time, seq)


def _priority_key(request: Request, seq: int) -> SortKey:
    return (request.priority, request.arrival_time, seq)


def _never(waiting: Request, running: Request) -> bool:
    """Who came first keeps the seat: a yield would only swap one wait for another."""
    return False


def _more_urgent(waiting: Request, running: Request) -> bool:
    """The margin is one priority class."""
    return waiting.priority < running.priority


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "fcfs": Policy(_fcfs_key, _never),
        "priority": Policy(_priority_key, _more_urgent),
    }
)
