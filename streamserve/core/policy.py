"""Policy is one sort key over all live requests, and when one yields to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from streamserve.core.request import Request
from streamserve.core.shares import Account

SortKey = tuple[float, ...]


Victims = Callable[[Request, Sequence[Request]], Iterator[Request]]


class Policy(NamedTuple):
    """In which order requests are served.

    ``key(request, seq)``: the smallest is served first; ``seq`` counts arrivals and breaks ties.
    ``outranks(waiting, running)``: whether a waiting request sorts before a running one by enough
    to take its place when seats, tokens or blocks run out. It must imply a smaller key, and two
    requests must never outrank each other.
    ``victims(waiting, running)``: whose seats may be taken for a waiting request, one after the
    other and the last first; none of them unless it outranks them.
    ``overtakes(waiting, running)``: whether a waiting request that finds a seat and blocks gets its
    tokens of the step first. It must imply a smaller key, and be implied by ``outranks``.
    ``looks_up_prefix``: whether ``key`` reads ``Request.num_uncached_tokens``.
    ``keeps_shares``: whether it reads ``Request.account``, whose rank changes with every step.
    """

    key: Callable[[Request, int], SortKey]
    outranks: Callable[[Request, Request], bool]
    victims: Victims
    overtakes: Callable[[Request, Request], bool]
    looks_up_prefix: bool = False
    keeps_shares: bool = False


AGEING_S_PER_TOKEN = 0.005
"""Of the shortest job first: how long a prompt lets others pass, for each token it has more."""


AGEING_S_PER_PRIORITY = 10.0
"""Of fair shares: how long a tenant's request lets its own more urgent ones pass, per class."""


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


def _fair_key(request: Request, seq: int) -> SortKey:
    """The tenant with the lowest rank first; its own by priority and as `_sjf_key`, with ageing.

    Whoever asked for more urgency than the other tenants would take a larger share than is due.
    """
    assert request.account is not None
    aged = request.arrival_time + AGEING_S_PER_TOKEN * request.num_uncached_tokens
    aged += AGEING_S_PER_PRIORITY * request.priority
    return (request.account.rank, aged, request.arrival_time, seq)


def _never(waiting: Request, running: Request) -> bool:
    """Who came first keeps the seat: a yield would only swap one wait for another."""
    return False


def _sorts_before(waiting: Request, running: Request) -> bool:
    """A swap of places within a step costs nothing: no margin."""
    return waiting.sort_key < running.sort_key


def _more_urgent(waiting: Request, running: Request) -> bool:
    """The margin is one priority class."""
    return waiting.priority < running.priority


def _is_due(waiting: Request, running: Request) -> bool:
    """The margin is a seat: of another tenant, which keeps its share; or a class, of one's own."""
    mine, theirs = waiting.account, running.account
    assert mine is not None
    assert theirs is not None
    if waiting.sort_key >= running.sort_key:
        return False
    return waiting.priority < running.priority if mine is theirs else mine.may_take_seat_of(theirs)


def _nobody(waiting: Request, running: Sequence[Request]) -> Iterator[Request]:
    return iter(())


def _less_urgent(waiting: Request, running: Sequence[Request]) -> Iterator[Request]:
    return (request for request in reversed(running) if _more_urgent(waiting, request))


def _more_than_their_share(waiting: Request, running: Sequence[Request]) -> Iterator[Request]:
    """As if each that yields had left, and ``waiting`` had no seat yet."""
    left: dict[Account, int] = {}
    for request in reversed(running):
        account = request.account
        assert account is not None
        num_left = left.get(account, 0)
        account.num_running -= num_left
        try:
            is_due = _is_due(waiting, request)
        finally:
            account.num_running += num_left
        if is_due:
            left[account] = num_left + 1
            yield request


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "sjf": Policy(_sjf_key, _never, _nobody, _sorts_before, looks_up_prefix=True),
        "fcfs": Policy(_fcfs_key, _never, _nobody, _never),
        "priority": Policy(_priority_key, _more_urgent, _less_urgent, _more_urgent),
        "fair": Policy(
            _fair_key,
            _is_due,
            _more_than_their_share,
            _sorts_before,
            looks_up_prefix=True,
            keeps_shares=True,
        ),
    }
)
