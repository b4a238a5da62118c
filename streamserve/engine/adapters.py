"""Which adapters there are: their names, the slots that a bank holds them in, and their salts.

An adapter's salt is drawn when it is loaded and precedes that of its requests: what it makes of a
prompt is never taken for another's, or for that of the same name loaded later.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from streamserve.errors import AdapterError

_FREE_AGAIN_S = 0.05
"""How often it is looked whether the requests of an adapter that was unloaded have ended."""


class AdapterBank(Protocol):
    """Where adapters are: the model's side."""

    num_slots: int

    def load(self, slot: int, path: Path) -> None:
        """Read an adapter into a free slot, on any thread. Raises ``ModelLoadError``."""
        ...

    def clear(self, slot: int) -> None:
        """Free a slot that no step in flight uses."""
        ...


@dataclass(frozen=True, slots=True)
class Adapter:
    """One that is loaded. Two with the same name are two."""

    name: str
    path: Path
    slot: int
    salt: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)


class Adapters:
    """The adapters of one model by name. Event-loop thread only, but for ``load_now``."""

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank
        self._is_used: Callable[[int], bool] = lambda _slot: False
        self._by_name: dict[str, Adapter] = {}
        self._free = list(range(bank.num_slots - 1, -1, -1))
        self._leaving: list[int] = []  # slots of unloaded ones that still have requests

    def serve(self, is_used: Callable[[int], bool]) -> None:
        """``is_used``: whether a request or a step in flight has this slot."""
        self._is_used = is_used

    def __iter__(self) -> Iterator[Adapter]:
        return iter(list(self._by_name.values()))

    def find(self, name: str | None) -> Adapter | None:
        """The adapter of this name."""
        return None if name is None else self._by_name.get(name)

    def make_room(self) -> None:
        """Unload the oldest adapter that nothing uses, if no slot is free."""
        if not self._free:
            idle = [a for a in self._by_name.values() if not self._is_used(a.slot)]
            for adapter in idle[:1]:
                self.unload(adapter.name)

    async def load(self, name: str, path: Path) -> Adapter:
        """Read an adapter while the engine runs.

        Raises AdapterError: the name is taken, no slot is free, or what the bank says of the files.
        """
        adapter = self._reserve(name, path)
        try:
            await asyncio.to_thread(self._bank.load, adapter.slot, path)
        except BaseException:
            self._free.append(adapter.slot)
            raise
        if name in self._by_name:
            self._bank.clear(adapter.slot)
            self._free.append(adapter.slot)
            raise AdapterError(f"adapter {name!r} was loaded meanwhile")
        self._by_name[name] = adapter
        return adapter

    def load_now(self, name: str, path: Path) -> Adapter:
        """As ``load``, before anything runs."""
        adapter = self._reserve(name, path)
        try:
            self._bank.load(adapter.slot, path)
        except BaseException:
            self._free.append(adapter.slot)
            raise
        self._by_name[name] = adapter
        return adapter

    def unload(self, name: str) -> Adapter | None:
        """Take no new requests for an adapter; those that it has go on, then its slot is free.

        ``None``: there is none of this name.
        """
        adapter = self._by_name.pop(name, None)
        if adapter is not None:
            self._leaving.append(adapter.slot)
            self._free_unused()
        return adapter

    def _free_unused(self) -> None:
        for slot in [slot for slot in self._leaving if not self._is_used(slot)]:
            self._bank.clear(slot)
            self._leaving.remove(slot)
            self._free.append(slot)
        if self._leaving:
            asyncio.get_running_loop().call_later(_FREE_AGAIN_S, self._free_unused)

    def _reserve(self, name: str, path: Path) -> Adapter:
        if name in self._by_name:
            raise AdapterError(
                f"adapter {name!r} is loaded already, from {self._by_name[name].path}"
            )
        if not self._free:
            raise AdapterError(
                f"adapter {name!r}: all {self._bank.num_slots} places for adapters are taken "
                "(--max-loras)"
            )
        return Adapter(name, path, self._free.pop())
