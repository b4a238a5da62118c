"""Reading a request's body: within its size limit, as a JSON object, or refused with a status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import orjson
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from streamserve.api.disconnect import ClientGoneError
from streamserve.api.errors import HttpError
from streamserve.errors import InvalidParameterError

_MAX_NAMES = 32
_MAX_NAME = 64


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int) -> bytes:
    """Return the bytes of a JSON body. Raises ``HttpError`` 413 or 415, and ``ClientGoneError``."""
    headers = Headers(scope=scope)
    _check_type(headers)
    length = headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > max_bytes):
        raise _too_large(max_bytes)
    return await _read(receive, max_bytes)


def parse_json_object(raw: bytes | memoryview) -> dict[str, Any]:
    """Return the body's JSON object. Raises ``InvalidParameterError`` for anything else."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise InvalidParameterError(
            f"The body is not valid JSON: {exc}", code="invalid_json"
        ) from None
    if not isinstance(body, dict):
        raise InvalidParameterError("The body must be a JSON object", code="invalid_json")
    return body


def _check_type(headers: Headers) -> None:
    content_type = headers.get("content-type", "application/json")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise HttpError(
            415,
            f"Content-Type must be application/json, got {media_type[:_MAX_NAME]!r}",
            code="unsupported_media_type",
        )
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise HttpError(
            415,
            f"Content-Encoding must be identity, got {encoding[:_MAX_NAME]!r}",
            code="unsupported_media_type",
        )


async def _read(receive: Receive, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(max_bytes: int) -> HttpError:
    # The connection stays: the server reads the rest away, so a client that is still writing
    # finds the answer instead of a reset.
    return HttpError(413, f"The body must be at most {max_bytes} bytes", code="request_too_large")


def ignored_fields_headers(names: Sequence[str]) -> dict[str, str]:
    """The header that names the fields which nobody knows, if there are any."""
    return {"X-Ignored-Fields": ignored_fields_header(names)} if names else {}


def ignored_fields_header(names: Sequence[str]) -> str:
    """The names that nobody knows, safe for a header whatever a client made of them."""
    shown = [quote(name[:_MAX_NAME], safe="[]") for name in names[:_MAX_NAMES]]
    if len(names) > _MAX_NAMES:
        shown.append(f"and {len(names) - _MAX_NAMES} more")
    return ", ".join(shown)
