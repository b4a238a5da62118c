"""Responses in memory, for who made them: so many, and so many bytes; the oldest go first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import orjson

from streamserve.api.responses.items import Item

Owner = str
"""Who may see a response: the name of a tenant, empty where the server asks for no keys."""

_PREFIXES = {
    "function_call": "fc",
    "function_call_output": "fco",
    "message": "msg",
    "reasoning": "rs",
}


class Turn:
    """What one response read and said, as JSON arrays, behind the turn that it went on with."""

    __slots__ = ("input", "key", "num_holders", "output", "parent")

    def __init__(self, key: str, parent: Turn | None, given: bytes, output: bytes) -> None:
        self.key = key
        self.parent = parent
        self.input = given
        self.output = output
        self.num_holders = 0  # the store's entries, and the turns that go on with this one

    @property
    def num_bytes(self) -> int:
        return len(self.input) + len(self.output)

    def path(self) -> list[Turn]:
        """The turns from the first to this one."""
        turns: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    def packed(self) -> bytes:
        """All items up to the end of this turn, as one JSON array."""
        arrays = [array for turn in self.path() for array in (turn.input, turn.output)]
        return b"[" + b",".join(array[1:-1] for array in arrays if array != b"[]") + b"]"

    def input_items(self) -> list[Item]:
        """Its own input, each with an id."""
        items: list[Item] = orjson.loads(self.input)
        for i, item in enumerate(items):
            item.setdefault("id", f"{_PREFIXES[item['type']]}_{self.key}_i{i}")
        return items

    def items(self) -> list[Item]:
        """Its own input and output."""
        output: list[Item] = orjson.loads(self.output)
        return self.input_items() + output

    def all_input(self) -> list[Item]:
        """What the model read: the turns before, and its own input."""
        items = [item for turn in self.path()[:-1] for item in turn.items()]
        return items + self.input_items()


@dataclass(frozen=True, slots=True)
class Stored:
    """A finished response. ``events`` are those of one that was written in the background."""

    owner: Owner
    response: bytes
    turn: Turn
    events: Sequence[bytes] | None = None

    @property
    def num_bytes(self) -> int:
        """Without the turn, which others may hold as well."""
        return len(self.response) + sum(map(len, self.events or ()))


class ResponseStore:
    """At most ``max_count`` responses of together ``max_bytes``. Event-loop thread only."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._entries: dict[str, Stored] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def keeps_any(self) -> bool:
        """Whether there is room for anything."""
        return self._max_count > 0

    def put(self, response_id: str, entry: Stored) -> None:
        """Keep a response, at the cost of the oldest. One that is too large by itself is not."""
        turns = sum(turn.num_bytes for turn in entry.turn.path())
        if entry.num_bytes + turns > self._max_bytes:
            return
        self._entries[response_id] = entry
        self.num_bytes += entry.num_bytes
        self._hold(entry.turn)
        while len(self._entries) > self._max_count or self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def get(self, response_id: str, owner: Owner) -> Stored | None:
        """The response, if there is one and it is the owner's."""
        entry = self._entries.get(response_id)
        return entry if entry is not None and entry.owner == owner else None

    def delete(self, response_id: str, owner: Owner) -> bool:
        """Whether there was such a response."""
        if self.get(response_id, owner) is None:
            return False
        self._drop(response_id)
        return True

    def check_integrity(self) -> None:
        """Assert that the bytes are those of what is held, and nothing else."""
        turns = {id(turn): turn for entry in self._entries.values() for turn in entry.turn.path()}
        held = sum(turn.num_bytes for turn in turns.values())
        assert self.num_bytes == held + sum(e.num_bytes for e in self._entries.values())
        assert len(self._entries) <= self._max_count
        assert self.num_bytes <= self._max_bytes

    def _drop(self, response_id: str) -> None:
        entry = self._entries.pop(response_id)
        self.num_bytes -= entry.num_bytes
        for turn in self._let_go(entry.turn):
            self.num_bytes -= turn.num_bytes

    def _hold(self, turn: Turn | None) -> None:
        while turn is not None:
            turn.num_holders += 1
            if turn.num_holders > 1:
                return
            self.num_bytes += turn.num_bytes
            turn = turn.parent

    @staticmethod
    def _let_go(turn: Turn | None) -> Iterator[Turn]:
        """Yield the turns that nobody holds any more."""
        while turn is not None:
            turn.num_holders -= 1
            if turn.num_holders:
                return
            yield turn
            turn = turn.parent
