"""What a request's headers say about connections that break: to be resumed, or to resume one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256

from starlette.types import Scope

from streamserve.api.errors import HttpError
from streamserve.api.kept import KeptOrigin
from streamserve.api.prompts import Endpoint, Prepared
from streamserve.api.tenants import tenant_of

_MAX_KEY = 255
_HEADERS = frozenset({b"idempotency-key", b"last-event-id", b"x-stream-resume"})
_RESUMABLE: frozenset[Endpoint] = frozenset({"chat", "completion"})
_RETRIABLE: frozenset[Endpoint] = _RESUMABLE | {"messages"}
_DETERMINISTIC: frozenset[Endpoint] = frozenset({"count_tokens", "embedding"})
"""Endpoints that say the same when they are asked again, and need not keep it."""

_EVENT_ID = re.compile(r"([A-Za-z0-9_-]{1,128})\.([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class Resumption:
    """``wants_ids``: the stream shall say where it is. ``at``: the stream and position to go on."""

    wants_ids: bool = False
    idempotency_key: str | None = None
    at: tuple[str, int] | None = None

    def origin(self, scope: Scope, endpoint: str, body: bytes) -> KeptOrigin:
        """What the request asks for, so that another can be compared with it."""
        owner = tenant_of(scope).name
        return KeptOrigin(owner, endpoint, sha256(body).digest(), self.idempotency_key)

    def check(self, prepared: Prepared, endpoint: Endpoint) -> None:
        """Raise 400 for what cannot be had together."""
        name = "X-Stream-Resume" if self.wants_ids else "Idempotency-Key"
        if not prepared.common.stream:
            if self.wants_ids:
                raise _refused("stream", f"must be true with {name}")
            return
        if endpoint not in _RESUMABLE:
            raise _refused("stream", f"must be false with {name}")
        options = prepared.common.stream_options
        unwanted = {
            "n": prepared.choices.n > 1,
            "prompt": len(prepared.prompts) > 1,
            "logprobs": prepared.params.logprobs is not None,
            "return_token_ids": prepared.fields.token_ids,
            "echo": any(prompt.echo for prompt in prepared.prompts),
            "stream_options.continuous_usage_stats": options.continuous_usage_stats,
            "include_timing": prepared.common.include_timing,
            "stream_options.include_progress": options.include_progress,
        }
        for field, is_wanted in unwanted.items():
            if is_wanted:
                several = " of several" if field in {"n", "prompt"} else ""
                raise _refused(field, f"{several} may not be given with {name} and stream: true")


def resumption_of(scope: Scope, endpoint: Endpoint) -> Resumption | None:
    """As ``read_resumption``; raises 400 too for what the endpoint cannot do."""
    if endpoint in _DETERMINISTIC:
        return None
    wish = read_resumption(scope)
    if wish is None or endpoint in _RESUMABLE:
        return wish
    unwanted = {
        "X-Stream-Resume": wish.wants_ids,
        "Last-Event-ID": wish.at is not None,
        "Idempotency-Key": endpoint not in _RETRIABLE,
    }
    for name, is_wanted in unwanted.items():
        if is_wanted:
            raise HttpError(
                400,
                f"{name} is not supported for {scope['path']}",
                param=name,
                code="unsupported_parameter",
            )
    return wish


def read_resumption(scope: Scope) -> Resumption | None:
    """What the headers ask for; ``None``: nothing, as nearly always. Raises 400."""
    given = {name: value for name, value in scope["headers"] if name in _HEADERS}
    if not given:
        return None
    wish = _text(given, "X-Stream-Resume")
    if wish not in {None, "0", "1", "true", "false"}:
        raise _refused("X-Stream-Resume", f"must be 1 or 0, got {wish!r}")
    key = _text(given, "Idempotency-Key")
    if key is not None and not 1 <= len(key) <= _MAX_KEY:
        raise _refused("Idempotency-Key", f"must have 1 to {_MAX_KEY} characters, got {len(key)}")
    event_id = _text(given, "Last-Event-ID")
    at = parse_event_id(event_id) if event_id else None
    found = Resumption(wish in {"1", "true"}, key, at)
    return None if found == Resumption() else found


def parse_event_id(event_id: str) -> tuple[str, int]:
    """The stream and the position that an event's ``id`` names. Raises 400."""
    match = _EVENT_ID.fullmatch(event_id)
    if match is None:
        raise _refused("Last-Event-ID", f"must be <stream>.<tokens>, got {event_id[:128]!r}")
    return match[1], int(match[2])


def _text(given: dict[bytes, bytes], name: str) -> str | None:
    value = given.get(name.lower().encode())
    if value is None:
        return None
    text = value.decode("latin-1").strip()
    if not (text.isascii() and text.isprintable()):
        raise _refused(name, "must hold printable ASCII characters only")
    return text


def _refused(param: str, what: str) -> HttpError:
    return HttpError(400, f"{param} {what}".replace("  ", " "), param=param, code="invalid_value")
