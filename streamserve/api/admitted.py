"""One request on its way: who asked, and what the engine made of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from streamserve.api.body import ignored_fields_headers
from streamserve.api.context import ApiContext
from streamserve.api.disconnect import DisconnectGuard
from streamserve.api.metrics import Delivery
from streamserve.api.prompts import Endpoint, Prepared
from streamserve.api.tenants import Tenant
from streamserve.api.whole import Choice
from streamserve.api.wire import Wire
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.stream import RequestStream


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request whose body was read. ``guard`` cancels what is done for it."""

    scope: Scope
    receive: Receive
    send: Send
    arrival_time: float
    guard: DisconnectGuard

    @property
    def name(self) -> str:
        """Its ``X-Request-Id``."""
        name: str = self.scope.get("state", {}).get("request_id", "")
        return name

    async def send_json(self, content: bytes, unknown_fields: Sequence[str] = ()) -> None:
        """Send a whole answer. From now on it does not matter whether the client stays."""
        headers = ignored_fields_headers(unknown_fields)
        response = Response(content, headers=headers, media_type="application/json")
        self.guard.release()
        await response(self.scope, self.receive, self.send)


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that the engine has taken: a stream, a delivery and a parser for each candidate."""

    prepared: Prepared
    wire: Wire
    streams: list[RequestStream]
    deliveries: Sequence[Delivery]
    parsers: Sequence[AnswerParser | None]


class Maker(Protocol):
    """What makes answers: an endpoint, as those see it that keep what it makes."""

    endpoint: Endpoint

    @property
    def context(self) -> ApiContext:
        """What all endpoints share."""

    async def prepare(self, raw: bytes, tenant: Tenant) -> Prepared:
        """Parse, render, tokenise, compile."""

    def wire(self, prepared: Prepared, owner: str) -> Wire:
        """How the answer looks."""

    def admit(self, prepared: Prepared, call: Call, wire: Wire | None = None) -> Admitted:
        """Hand the request to the engine; ``making`` must follow at once."""

    def making(self, admitted: Admitted, call: Call) -> AbstractContextManager[None]:
        """An admitted request's life."""

    async def collect(self, admitted: Admitted) -> tuple[bytes, list[Choice]]:
        """Wait for an answer in one piece: its content, and all candidates."""
