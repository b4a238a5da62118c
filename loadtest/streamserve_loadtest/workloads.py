"""What is asked of a server, as data: who comes when, with how many tokens, for how many.

A workload is a list of groups that run at the same time. A group draws conversations of one or
several kinds, either in a closed loop (each client sends its next request when the last one has
ended) or in an open one (they arrive when the clock says so, whatever the server does).

``prompt_tokens`` of a first turn is what the server has to see beyond the shared prefix, chat
template included; of a later turn, what it adds to the history and the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a conversation."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Kind:
    """A sort of conversation. ``prefix_tokens`` is a system prompt that all of the kind share."""

    name: str
    turns: tuple[Turn, ...]
    prefix_tokens: int = 0
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """``clients`` at a time, each with ``conversations`` one after the other."""

    clients: int
    conversations: int


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Arrivals by the clock: ``poisson``, ``burst`` (``burst_size`` at once) or ``uniform``.

    ``rate`` is conversations per second on average; they arrive for ``duration_s``.
    """

    arrivals: str
    rate: float
    duration_s: float
    burst_size: int = 1


@dataclass(frozen=True, slots=True)
class Group:
    """Conversations that are reported together.

    A background group goes on until all others have ended, and is then cut off. ``cancel_share``
    of the requests are cancelled by their reader after ``cancel_after`` tokens.
    """

    name: str
    kinds: tuple[Kind, ...]
    load: ClosedLoop | OpenLoop
    start_s: float = 0.0
    is_background: bool = False
    cancel_share: float = 0.0
    cancel_after: int = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """When a request counts as good."""

    first_token_s: float
    itl_p99_s: float


@dataclass(frozen=True, slots=True)
class Workload:
    """Groups that run together; with ``rates``, once for each rate of the open loop."""

    name: str
    title: str
    groups: tuple[Group, ...]
    rates: tuple[float, ...] = ()
    limits: Limits | None = None

    def at_rate(self, rate: float) -> Workload:
        """The same with every open loop at ``rate``."""
        groups = tuple(
            replace(group, load=replace(group.load, rate=rate))
            if isinstance(group.load, OpenLoop)
            else group
            for group in self.groups
        )
        return replace(self, groups=groups, rates=())

    def lasting(self, duration_s: float) -> Workload:
        """The same with every open loop for ``duration_s``."""
        groups = tuple(
            replace(group, load=replace(group.load, duration_s=duration_s))
            if isinstance(group.load, OpenLoop)
            else group
            for group in self.groups
        )
        return replace(self, groups=groups)

    @property
    def max_tokens(self) -> int:
        """The longest context that a conversation reaches."""
        return max(
            kind.prefix_tokens + sum(t.prompt_tokens + t.output_tokens for t in kind.turns)
            for group in self.groups
            for kind in group.kinds
        )


def _closed(
    name: str, kind: Kind, clients: int, conversations: int, *, is_background: bool = False
) -> Group:
    return Group(name, (kind,), ClosedLoop(clients, conversations), is_background=is_background)


SMALL_MODEL = Limits(first_token_s=0.5, itl_p99_s=0.1)
LARGER_MODEL = Limits(first_token_s=1.5, itl_p99_s=0.25)

_ONE = Kind("one", (Turn(64, 128),))
_CHAT = Kind("chat", (Turn(32, 64),), prefix_tokens=512)
_STEADY = Kind("steady", (Turn(32, 1500),))
_LONG = Kind("long", (Turn(2000, 16),))
_SECOND = Kind("second turn", (Turn(900, 100), Turn(32, 16)))
_BRIEF = Kind("brief", (Turn(32, 32),))
_MIX = (
    Kind("short", (Turn(64, 64),), share=0.60),
    Kind("long", (Turn(1000, 128),), share=0.25),
    Kind("three turns", (Turn(64, 64), Turn(64, 64), Turn(64, 64)), share=0.15),
)

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("W1", "one stream", (_closed("one", _ONE, 1, 3),)),
        Workload("W2", "16 chats, shared system prompt", (_closed("chats", _CHAT, 16, 3),)),
        Workload(
            "W3",
            "8 steady streams, a long prompt every 3 s",
            (
                _closed("steady", _STEADY, 8, 100, is_background=True),
                Group("long", (_LONG,), OpenLoop("uniform", 1 / 3, 15.0), start_s=8.0),
            ),
        ),
        Workload("W4", "second turn of a long chat", (_closed("second turn", _SECOND, 1, 3),)),
        Workload("W5", "64 short streams", (_closed("brief", _BRIEF, 64, 2),)),
        Workload(
            "W6",
            "open loop at rising rates",
            (Group("mix", _MIX, OpenLoop("poisson", 1.0, 120.0), cancel_share=0.10),),
            rates=(0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
            limits=SMALL_MODEL,
        ),
    )
}
