"""Rate limits per tenant: token buckets for requests and for the prompt tokens that are computed.

A bucket holds a minute's worth when it is full. A prompt longer than that is let in by a full one,
which is then overdrawn: others wait until it has filled up again. Whole prompts are taken, and what
the prefix cache held is given back when the request gets its seat.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Message, Scope, Send

from streamserve.api.tenants import Tenant
from streamserve.core.clock import Clock
from streamserve.errors import RateLimitError

ALLOWANCE = "streamserve.allowance"
"""In the scope of a request whose tenant has limits: its `Allowance`."""


class Bucket:
    """So many a minute. ``name`` is what is counted."""

    __slots__ = ("_level", "_updated", "limit", "name")

    def __init__(self, name: str, limit: int, now: float) -> None:
        self.name = name
        self.limit = limit
        self._level = float(limit)
        self._updated = now

    def level(self, now: float) -> float:
        """How many are left; below 0 when it is overdrawn."""
        filled = self._level + (now - self._updated) * self.limit / 60.0
        self._level, self._updated = min(filled, float(self.limit)), now
        return self._level

    def set_limit(self, limit: int, now: float) -> None:
        """Change the limit; what was taken stays taken."""
        if limit != self.limit:
            self._level = self.level(now) + limit - self.limit
            self.limit = limit

    def take(self, amount: int, now: float) -> None:
        """Take ``amount``. Raises ``RateLimitError``, and takes nothing, if there are not so many.

        Of more than the bucket holds, as many as it holds must be there.
        """
        wait_s = self.seconds_until(amount, now)
        if wait_s > 0.0:
            raise RateLimitError(
                f"Rate limit reached: {self.limit} {self.name} per minute, of which"
                f" {max(int(self._level), 0)} are left and {amount} were asked for",
                retry_after_s=wait_s,
            )
        self._level -= amount

    def give_back(self, amount: int) -> None:
        """Undo a part of ``take``."""
        self._level += amount

    def seconds_until(self, amount: int, now: float) -> float:
        """When so many are there, or the bucket is full."""
        missing = min(amount, self.limit) - self.level(now)
        return max(missing, 0.0) * 60.0 / self.limit


class RateLimiter:
    """The buckets of all tenants that have limits, by their names."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def allowance(self, tenant: Tenant) -> Allowance | None:
        """What a request of ``tenant`` is to take from; ``None``: it has no limits."""
        requests = self._bucket(tenant, "requests", tenant.requests_per_minute)
        tokens = self._bucket(tenant, "tokens", tenant.tokens_per_minute)
        if requests is None and tokens is None:
            return None
        return Allowance(self._clock, requests, tokens)

    def _bucket(self, tenant: Tenant, name: str, limit: int | None) -> Bucket | None:
        if limit is None:
            return None
        key = (tenant.name, name)
        now = self._clock()
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(name, limit, now)
        bucket.set_limit(limit, now)
        return bucket


class Allowance:
    """What one HTTP request takes from its tenant's buckets."""

    def __init__(self, clock: Clock, requests: Bucket | None, tokens: Bucket | None) -> None:
        self._clock = clock
        self._requests = requests
        self._tokens = tokens
        self._unsettled: dict[int, int] = {}  # tokens of prompts that have no seat yet

    def take_request(self) -> None:
        """Count the request, before anything is done for it. Raises ``RateLimitError``."""
        if self._requests is not None:
            self._requests.take(1, self._clock())

    def take_tokens(self, lengths: list[int]) -> None:
        """Take the tokens of all prompts or of none. Raises ``RateLimitError``."""
        if self._tokens is not None:
            self._tokens.take(sum(lengths), self._clock())
            self._unsettled = dict(enumerate(lengths))

    def settle(self, index: int, num_cached_tokens: int) -> None:
        """The prompt of this place has a seat, and so many of its tokens were cached."""
        if self._tokens is not None and self._unsettled.pop(index, 0):
            self._tokens.give_back(num_cached_tokens)

    def close(self) -> None:
        """The request has ended: what never got a seat was not computed."""
        if self._tokens is not None and self._unsettled:
            self._tokens.give_back(sum(self._unsettled.values()))
            self._unsettled = {}

    def headers(self) -> Mapping[bytes, bytes]:
        """OpenAI's ``x-ratelimit-*``, as of now."""
        now = self._clock()
        found: dict[bytes, bytes] = {}
        for bucket in (self._requests, self._tokens):
            if bucket is not None:
                name = bucket.name.encode()
                left = max(int(bucket.level(now)), 0)
                full_in = duration(bucket.seconds_until(bucket.limit, now))
                found[b"x-ratelimit-limit-" + name] = b"%d" % bucket.limit
                found[b"x-ratelimit-remaining-" + name] = b"%d" % left
                found[b"x-ratelimit-reset-" + name] = full_in.encode()
        return found

    def sender(self, send: Send) -> Send:
        """``send``, with these headers on the response."""

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self.headers().items()]
            await send(message)

        return send_with_limits


def allowance_of(scope: Scope) -> Allowance | None:
    """What the request takes from; ``None``: nothing limits it."""
    allowance: Allowance | None = scope.get(ALLOWANCE)
    return allowance


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``1m2.5s``, ``120ms``."""
    if seconds < 1.0:
        return f"{seconds * 1e3:.0f}ms"
    minutes, rest = divmod(round(seconds, 3), 60.0)
    return (f"{minutes:.0f}m" if minutes else "") + f"{rest:g}s"
