"""Pure ASGI middlewares: they act on a request's and a response's headers, never on a frame."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamserve.api.errors import HttpError, error_response
from streamserve.api.paths import is_for_messages, route_path
from streamserve.api.rate_limits import ALLOWANCE, RateLimiter
from streamserve.api.tenants import TENANT, KeyRing, Tenant

RAW_SEND = "streamserve.raw_send"
"""In the scope: the server's own ``send``, which passes no middleware."""

_GUARDED = ("/v1", "/tokenize", "/detokenize", "/debug")
"""How guarded paths begin. Routing is kinder than equality: it takes ``/tokenize\\n``, too."""

_WRONG_KEY = "invalid_api_key"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def is_sane_request_id(value: str) -> bool:
    """Whether a client's own id may appear in our headers and logs."""
    return _SANE_REQUEST_ID.fullmatch(value) is not None


class RequestIdMiddleware:
    """Gives every response an ``X-Request-Id``: the client's own if it is sane.

    The id is left in ``scope["state"]["request_id"]``. It names the HTTP request, for logs; the
    engine's id is always our own, so that two clients cannot collide.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not is_sane_request_id(request_id):
            request_id = f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id

        # Anthropic's clients look for it under a name of their own.
        names = (b"x-request-id", b"request-id") if is_for_messages(scope) else (b"x-request-id",)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name, request_id.encode()) for name in names),
                ]
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKeyMiddleware:
    """Asks for a key where a request costs something: under ``/v1``, and for tokenising.

    Health, version and metrics stay open, as in vLLM, and so do the pages: they hold no secret.
    Whose key it was is left in the scope (``tenant_of``).
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing,
        limiter: RateLimiter,
        on_refused: Callable[[int, str], None],
    ) -> None:
        """``on_refused`` is called with the status and the code of every refusal."""
        self._app = app
        self._on_refused = on_refused
        self._keys = keys
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_guarded(scope):
            await self._app(scope, receive, send)
            return
        await self._keys.refresh()
        tenant = self._tenant(scope)
        if tenant is not None:
            scope[TENANT] = tenant
            allowance = self._limiter.allowance(tenant)
            if allowance is not None:
                scope[ALLOWANCE] = allowance
                send = allowance.sender(send)
            await self._app(scope, receive, send)
            return
        self._on_refused(401, _WRONG_KEY)
        refusal = HttpError(
            401,
            "Missing or wrong API key: send it as 'Authorization: Bearer <key>' or as"
            " 'X-Api-Key: <key>'",
            code=_WRONG_KEY,
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(refusal, scope)(scope, receive, send)

    def _tenant(self, scope: Scope) -> Tenant | None:
        found = [self._keys.find(key) for key in _given_keys(scope)]
        return next((tenant for tenant in found if tenant is not None), None)


def _given_keys(scope: Scope) -> Iterator[bytes]:
    """The key as OpenAI's clients send it, then as Anthropic's do: a client may send both."""
    headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # the first of each counts
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        yield key.strip()
    if b"x-api-key" in headers:
        yield headers[b"x-api-key"].strip()


def _is_guarded(scope: Scope) -> bool:
    return route_path(scope).startswith(_GUARDED)
