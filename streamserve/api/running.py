"""The answers that are being made, and how somebody else than their reader ends one.

``POST /v1/chat/completions/{id}/cancel`` and ``/v1/completions/{id}/cancel``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamserve.api.errors import HttpError
from streamserve.api.frames import CHAT, COMPLETION, usage_content
from streamserve.api.tenants import tenant_of
from streamserve.engine.outputs import Usage
from streamserve.engine.stream import RequestStream


@dataclass(frozen=True, slots=True)
class RunningAnswer:
    """One answer with the streams of its choices, ``num_per_prompt`` for each prompt."""

    id: str
    endpoint: str
    owner: str  # the tenant's name
    header_id: str  # the HTTP request's, which its client may have chosen
    streams: Sequence[RequestStream]
    num_per_prompt: int

    def cancel(self) -> None:
        """End it; the blocks of all choices are free by the next step."""
        for stream in self.streams:
            stream.cancel()

    @property
    def usages(self) -> list[Usage]:
        """What each choice has used, once all have ended."""
        return [stream.usage or Usage(stream.num_prompt_tokens) for stream in self.streams]


class RunningAnswers:
    """Finds the answers that are being made, each for its owner only."""

    def __init__(self) -> None:
        self._answers: dict[str, RunningAnswer] = {}

    @contextmanager
    def entry(self, answer: RunningAnswer) -> Iterator[None]:
        """Let an answer be found while it is made."""
        self._answers[answer.id] = answer
        try:
            yield
        finally:
            del self._answers[answer.id]

    def find(self, name: str, endpoint: str, owner: str) -> RunningAnswer | None:
        """The answer of this id, or the newest whose request had it as ``X-Request-Id``."""
        answer = self._answers.get(name)
        if answer is None:
            named = (a for a in reversed(self._answers.values()) if a.header_id == name)
            answer = next((a for a in named if a.owner == owner), None)
        if answer is None or (answer.owner, answer.endpoint) != (owner, endpoint):
            return None
        return answer


class CancelEndpoint:
    """Ends one of the owner's answers and says what it has used. 404 for whatever is not there."""

    def __init__(self, running: RunningAnswers, endpoint: str, object_name: str) -> None:
        self._running = running
        self._endpoint = endpoint
        self._object = object_name

    async def cancel(self, request: Request) -> Response:
        name: str = request.path_params["id"]
        answer = self._running.find(name, self._endpoint, tenant_of(request.scope).name)
        if answer is None or all(stream.has_ended for stream in answer.streams):
            raise HttpError(
                404,
                f"No {self._object} {name[:128]!r} of this API key is being made",
                code="answer_not_found",
            )
        answer.cancel()
        content = {
            "id": answer.id,
            "object": self._object,
            "status": "cancelled",
            "usage": usage_content(answer.usages, answer.num_per_prompt),
        }
        return Response(orjson.dumps(content), media_type="application/json")


def cancel_routes(running: RunningAnswers) -> list[Route]:
    """Where answers are cancelled."""
    return [
        Route(f"{path}/{{id}}/cancel", CancelEndpoint(running, *names).cancel, methods=["POST"])
        for path, names in (
            ("/v1/chat/completions", ("chat", CHAT.object)),
            ("/v1/completions", ("completion", COMPLETION.object)),
        )
    ]
