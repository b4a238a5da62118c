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
"""How often it is looked whether the requests of an adapter that makes room have ended."""


class AdapterBank(Protocol):
    """Where adapters are: the model's side."""

    num_slots: int

    def load(self, slot: int, path: Path) -> None:
        """Read an adapter into a free slot, on any thread. Raises ``ModelLoadError``."""
        ...

    def clear(self, slot: int) -> None:
        """Free a slot that no step in flight uses."""
        ...

    def close(self) -> None:
        """Let go of the memory of all slots, once no step runs any more."""
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
        self._loading = asyncio.Lock()

    def serve(self, is_used: Callable[[int], bool]) -> None:
        """``is_used``: whether a request or a step in flight has this slot."""
        self._is_used = is_used

    def close(self) -> None:
        """Let go of the bank's memory, once the engine has stopped."""
        self._bank.close()

    def __iter__(self) -> Iterator[Adapter]:
        return iter(list(self._by_name.values()))

    def find(self, name: str | None) -> Adapter | None:
        """The adapter of this name."""
        return None if name is None else self._by_name.get(name)

    async def load(self, name: str, path: Path) -> Adapter:
        """Read an adapter while the engine runs, one at a time.

        Raises AdapterError: the name is taken, no slot is free, or what the bank says of the files.
        """
        async with self._loading:
            return await self._load(name, path)

    async def get(self, name: str, path: Path) -> Adapter:
        """The adapter of this name, loaded from ``path`` if there is none.

        The oldest that nothing uses makes room for it; while requests have all of them, it waits.
        It is there until the next ``await``, and as long as a request has it. Raises AdapterError
        as ``load`` does, but for room, and for a name that is loaded from ``path`` already.
        """
        if (found := self._by_name.get(name)) is None:
            async with self._loading:
                if (found := self._by_name.get(name)) is None:
                    while True:
                        if self._has_room():
                            return await self._load(name, path)
                        await asyncio.sleep(_FREE_AGAIN_S)
        if found.path != path:
            raise _taken(found)
        return found

    async def _load(self, name: str, path: Path) -> Adapter:
        adapter = self._reserve(name, path)
        reading = asyncio.ensure_future(asyncio.to_thread(self._bank.load, adapter.slot, path))
        try:
            await asyncio.shield(reading)
        except asyncio.CancelledError:
            # The thread goes on: until it has ended, nobody else may be read into its slot.
            reading.add_done_callback(lambda done: self._abandon(adapter.slot, done))
            raise
        except BaseException:
            self._free.append(adapter.slot)
            raise
        self._by_name[name] = adapter
        return adapter

    def _abandon(self, slot: int, done: asyncio.Future[None]) -> None:
        if done.cancelled():  # the loop is closing
            return
        if done.exception() is None:
            self._bank.clear(slot)
        self._free.append(slot)

    def _has_room(self) -> bool:
        if not self._free:
            idle = [a for a in self._by_name.values() if not self._is_used(a.slot)]
            for adapter in idle[:1]:
                self.unload(adapter.name)
        return bool(self._free)

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
        if (found := self._by_name.get(name)) is not None:
            raise _taken(found)
        if not self._free:
            raise AdapterError(
                f"adapter {name!r}: all {self._bank.num_slots} places for adapters are taken "
                "(--max-loras)"
            )
        return Adapter(name, path, self._free.pop())


def _taken(adapter: Adapter) -> AdapterError:
    return AdapterError(f"adapter {adapter.name!r} is loaded already, from {adapter.path}")
