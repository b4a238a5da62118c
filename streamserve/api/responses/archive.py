"""All responses that can be asked for by id: the finished ones, and those on their way."""

from __future__ import annotations

from streamserve.api.errors import HttpError
from streamserve.api.responses.background import BackgroundRun
from streamserve.api.responses.items import Item
from streamserve.api.responses.references import find_references
from streamserve.api.responses.store import Owner, ResponseStore, Stored, Turn


class Archive:
    """What ``POST`` leaves and the other methods find. Event-loop thread only."""

    def __init__(self, store: ResponseStore) -> None:
        self.store = store
        self.running: dict[str, BackgroundRun] = {}

    def find(self, response_id: str, owner: Owner) -> Stored | BackgroundRun:
        """The owner's response. Raises ``HttpError`` 404."""
        run = self.running.get(response_id)
        if run is not None and run.owner == owner:
            return run
        stored = self.store.get(response_id, owner)
        if stored is None:
            raise HttpError(
                404,
                f"There is no response with id {response_id[:64]!r}",
                param="response_id",
                code="response_not_found",
            )
        return stored

    def delete(self, response_id: str, owner: Owner) -> None:
        """Forget a response; one on its way is cancelled. Raises ``HttpError`` 404."""
        found = self.find(response_id, owner)
        if isinstance(found, BackgroundRun):
            found.cancel()
        self.store.delete(response_id, owner)

    def turn(self, key: str, previous: str | None, given: bytes, owner: Owner) -> Turn:
        """The turn of a new response, without its output."""
        stored = None if previous is None else self.store.get(previous, owner)
        return Turn(key, None if stored is None else stored.turn, given, b"[]")

    async def references_of(self, raw: bytes, owner: Owner) -> bytes:
        """What a body refers to, packed. Raises ``InvalidParameterError``."""

        def before(response_id: str) -> bytes | None:
            stored = self.store.get(response_id, owner)
            return None if stored is None else stored.turn.packed()

        def is_running(response_id: str) -> bool:
            run = self.running.get(response_id)
            return run is not None and run.owner == owner

        def items_of(response_id: str) -> list[Item]:
            stored = self.store.get(response_id, owner)
            return [] if stored is None else stored.turn.items()

        return await find_references(raw, before, is_running, items_of)
