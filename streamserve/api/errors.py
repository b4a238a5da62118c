"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``.

Those of ``/v1/messages`` have Anthropic's: ``{"type": "error", "error": {"type", "message"}}``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from streamserve.api.paths import is_for_messages, route_path
from streamserve.errors import EngineError, RequestError, StreamServeError

logger = logging.getLogger(__name__)


class HttpError(RequestError):
    """A refusal that only HTTP knows: wrong key, unknown model, body too large, shutting down."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status
        self.headers = dict(headers or {})


_RESTART_S = 1.0


def shutting_down(retry_after_s: float) -> HttpError:
    """The refusal of a server that drains: another one, or this one restarted, may take it."""
    return HttpError(
        503,
        "The server is shutting down and takes no new requests",
        code="shutting_down",
        headers=retry_headers(retry_after_s),
    )


def error_type(status: int) -> str:
    """OpenAI's ``type`` for a status."""
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


# Anthropic's types by status; any other 4xx is an invalid request, any other 5xx their fault.
_MESSAGE_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def message_error(
    status: int, content: Mapping[str, Any], request_id: str | None = None
) -> dict[str, Any]:
    """An error in Anthropic's shape; ``status`` and ``content`` as of ``error_content``."""
    kind = _MESSAGE_ERRORS.get(status)
    if kind is None:
        kind = "api_error" if status >= 500 else "invalid_request_error"
    error = {"type": "error", "error": {"type": kind, "message": content["message"]}}
    return error if request_id is None else {**error, "request_id": request_id}


def error_content(exc: BaseException) -> tuple[int, dict[str, Any]]:
    """The status and the ``error`` object that tell a client about ``exc``.

    Our own errors speak for themselves; the text of any other stays in the log.
    """
    if isinstance(exc, RequestError):
        status, message, param, code = exc.status, exc.message, exc.param, exc.code
    elif isinstance(exc, EngineError):
        status, message, param, code = exc.status, exc.message, None, exc.code
    else:
        status, param, code = 500, None, "internal_error"
        message = "The server had an error while processing the request"
    return status, {"message": message, "type": error_type(status), "param": param, "code": code}


def error_response(exc: BaseException, scope: Scope) -> Response:
    """``exc`` as a whole HTTP response to the request of ``scope``."""
    status, content = error_content(exc)
    body: dict[str, Any] = {"error": content}
    if is_for_messages(scope):
        body = message_error(status, content, scope.get("state", {}).get("request_id"))
    headers: dict[str, str] = {}
    if isinstance(exc, HttpError):
        headers = exc.headers
    elif isinstance(exc, RequestError | EngineError) and exc.retry_after_s is not None:
        headers = retry_headers(exc.retry_after_s)
    elif status == 503:  # the server ends, or has to be started again
        headers = retry_headers(_RESTART_S)
    return Response(
        orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def retry_headers(seconds: float) -> dict[str, str]:
    """When to come back: in whole seconds, and as OpenAI's clients prefer it."""
    # 0 would ask for a busy loop.
    return {
        "Retry-After": str(max(1, math.ceil(seconds))),
        "retry-after-ms": str(max(1, math.ceil(seconds * 1e3))),
    }


_OF_PEERS = {
    **dict.fromkeys(("/v1", "/api/tags"), "/v1/models"),
    **dict.fromkeys(("/api/chat", "/invocations"), "/v1/chat/completions"),
    **dict.fromkeys(
        ("/api/generate", "/completion", "/generate", "/generate_stream"), "/v1/completions"
    ),
}
"""What clients of Ollama, llama.cpp's server and TGI ask for."""


def _url_meant(request: Request) -> str:
    """The route that a client whose base URL is wrong was looking for, as a question."""
    path = route_path(request.scope).rstrip("/")
    known = {route.path for route in request.app.routes if isinstance(route, Route)}
    meant = (
        *(path, f"/v1{path}", path.removeprefix("/v1"), path.removeprefix("/openai")),
        _OF_PEERS.get(path, ""),
    )
    return next((f" (did you mean {name}?)" for name in meant if name in known), "")


async def on_streamserve_error(request: Request, exc: Exception) -> Response:
    """Starlette's exception handler for every error of ours."""
    return error_response(exc, request.scope)


async def on_http_exception(request: Request, exc: Exception) -> Response:
    """Starlette's exception handler for its router's 404 and 405."""
    assert isinstance(exc, HTTPException)
    url = f"{request.method} {request.scope['path']}"
    if exc.status_code == 404:
        error = HttpError(404, f"Unknown URL: {url}{_url_meant(request)}", code="unknown_url")
    elif exc.status_code == 405:
        allow = (exc.headers or {}).get("Allow", "")
        error = HttpError(
            405, f"Method not allowed: {url} (allowed: {allow})", code="method_not_allowed"
        )
    else:
        error = HttpError(exc.status_code, exc.detail)
    error.headers.update(exc.headers or {})
    return error_response(error, request.scope)


async def on_unexpected_error(request: Request, exc: Exception) -> Response:
    """Starlette's exception handler for bugs; the server logs the traceback.

    It stands outside of our middlewares, so the id is put on here.
    """
    response = error_response(exc, request.scope)
    request_id = request.scope.get("state", {}).get("request_id")
    if request_id is not None:
        response.headers["X-Request-Id"] = request_id
    return response


EXCEPTION_HANDLERS = {
    StreamServeError: on_streamserve_error,
    HTTPException: on_http_exception,
    Exception: on_unexpected_error,
}
