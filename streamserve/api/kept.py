"""Answers that outlive their connection: found again by their id, or by the client's own key.

An answer that is kept is made whoever reads it, until nobody has for a while; what it said stays
until then. Only the tenant whose key asked for it finds it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from streamserve.api.errors import HttpError
from streamserve.api.gate import Gate


@dataclass(frozen=True, slots=True)
class KeptOrigin:
    """What an answer is an answer to: a retry must ask for the same."""

    owner: str  # the tenant's name
    endpoint: str
    body_digest: bytes
    idempotency_key: str | None

    def check_same(self, other: KeptOrigin) -> None:
        """Raise 422 unless ``other`` asks for the same."""
        if (self.endpoint, self.body_digest) != (other.endpoint, other.body_digest):
            name = "Last-Event-ID" if other.idempotency_key is None else "Idempotency-Key"
            raise HttpError(
                422,
                f"The body is another than that of the first request with this {name}",
                param=name,
                code="body_differs",
            )


class KeptAnswer:
    """One answer: ``run`` makes it. Ends ``timeout_s`` after the last reader has left.

    Until then it holds a place inside the gate, unless a reader was sent all of it: a server that
    ends waits for whoever may come back for the rest.
    """

    def __init__(
        self, answer_id: str, origin: KeptOrigin, timeout_s: float, kept: KeptAnswers
    ) -> None:
        self.id = answer_id
        self.origin = origin
        self._timeout_s = timeout_s
        self._kept = kept
        self._num_readers = 0
        self._is_delivered = False
        self._timer: asyncio.TimerHandle | None = None
        self._place = ExitStack()  # inside the gate, while nobody reads
        self._task: asyncio.Task[None] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will be said."""
        return self._task is not None and self._task.done()

    @property
    def num_bytes(self) -> int:
        """What it keeps, about."""
        return 0

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Make the answer, beside whoever reads it."""
        self._task = asyncio.create_task(work)

    @contextmanager
    def read(self) -> Iterator[None]:
        """Hold the answer while somebody reads it."""
        self._num_readers += 1
        self._stop_timer()
        try:
            yield
        finally:
            self._num_readers -= 1
            if not self._num_readers:
                self._start_timer()

    @property
    def is_read(self) -> bool:
        """Whether somebody reads it now."""
        return self._num_readers > 0

    def expire(self) -> None:
        """Forget it, and end it if it is still being made."""
        self._stop_timer()
        self._kept.forget(self)
        if self._task is not None:
            self._task.cancel()

    def delivered(self) -> None:
        """A reader was sent all of it, or how it failed: nobody need come back."""
        self._is_delivered = True
        self._place.close()

    def failed(self) -> None:
        """It was no success: a retry shall try again."""
        self._kept.forget_key(self)

    def _start_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self.expire)
        if not self._is_delivered:
            self._place.enter_context(self._kept.gate.enter(goes_on=True))

    def _stop_timer(self) -> None:
        self._place.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class KeptAnswers:
    """All that are kept: together about ``max_bytes`` of those that have ended."""

    def __init__(self, max_bytes: int, gate: Gate) -> None:
        self.gate = gate
        self._max_bytes = max_bytes
        self._by_id: dict[str, KeptAnswer] = {}
        self._by_key: dict[tuple[str, str], KeptAnswer] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, answer: KeptAnswer) -> None:
        """Let it be found. The oldest that nobody reads make room."""
        self._by_id[answer.id] = answer
        key = answer.origin.idempotency_key
        if key is not None:
            self._by_key[answer.origin.owner, key] = answer
        ended = [kept for kept in self._by_id.values() if kept.has_ended]
        num_bytes = sum([kept.num_bytes for kept in ended])
        for kept in ended:
            if num_bytes <= self._max_bytes:
                return
            if not kept.is_read:
                num_bytes -= kept.num_bytes
                kept.expire()

    def of_id(self, answer_id: str, owner: str) -> KeptAnswer:
        """The owner's answer. Raises 404 for any other."""
        answer = self._by_id.get(answer_id)
        if answer is None or answer.origin.owner != owner:
            raise HttpError(
                404,
                f"There is no stream {answer_id[:128]!r} of this API key, or not any more",
                param="Last-Event-ID",
                code="stream_not_found",
            )
        return answer

    def of_key(self, origin: KeptOrigin) -> KeptAnswer | None:
        """The answer of an earlier request with the same key. Raises 422 if it asked otherwise."""
        if origin.idempotency_key is None:
            return None
        answer = self._by_key.get((origin.owner, origin.idempotency_key))
        if answer is not None:
            answer.origin.check_same(origin)
        return answer

    def has(self, answer_id: str | None, idempotency_key: str | None, owner: str) -> bool:
        """Whether the owner has an answer of this id or, without one, under this key."""
        if answer_id is None:
            return (owner, idempotency_key or "") in self._by_key
        answer = self._by_id.get(answer_id)
        return answer is not None and answer.origin.owner == owner

    def close(self) -> None:
        """Forget all that nobody reads: there is no time left to come back."""
        for answer in list(self._by_id.values()):
            if not answer.is_read:
                answer.expire()

    def forget(self, answer: KeptAnswer) -> None:
        """It is found no more. Idempotent."""
        self._by_id.pop(answer.id, None)
        self.forget_key(answer)

    def forget_key(self, answer: KeptAnswer) -> None:
        """It is found by its id only. Idempotent."""
        key = (answer.origin.owner, answer.origin.idempotency_key or "")
        if self._by_key.get(key) is answer:
            del self._by_key[key]


class WholeAnswer(KeptAnswer):
    """An answer that is not streamed: its bytes are there for all that ask for them."""

    def __init__(
        self, answer_id: str, origin: KeptOrigin, timeout_s: float, kept: KeptAnswers
    ) -> None:
        super().__init__(answer_id, origin, timeout_s, kept)
        self._content: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._size = 0

    @property
    def num_bytes(self) -> int:
        return self._size

    async def run(self, make: Callable[[], Coroutine[Any, Any, bytes]]) -> None:
        """Make it with ``make``."""
        try:
            content = await make()
        except Exception as exc:
            self.failed()
            self._content.set_exception(exc)
            self._content.exception()  # somebody may have left before it came
        else:
            self._size = len(content)
            self._content.set_result(content)

    async def content(self) -> bytes:
        """Wait for it. Raises what making it raised."""
        return await asyncio.shield(self._content)
