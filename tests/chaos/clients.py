"""Clients on raw sockets: honest ones, who check every byte, and all the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.server import MODEL, solo_text

TIMEOUT_S = 60.0
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


class BrokenPromiseError(Exception):
    """The server did what it must not do."""


def request_bytes(path: str, body: Any, method: str = "POST") -> bytes:
    raw = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: chaos\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + raw


def text_of(raw: bytes) -> tuple[str, str]:
    """The text of a streamed body so far, and its end: ``done``, an error's code, or nothing."""
    text, end = "", ""
    # Frames and chunks of the transfer end at the same places: no line is cut.
    for line in raw.split(b"\n"):
        if not line.startswith(b"data: "):
            continue
        if end:
            raise BrokenPromiseError(f"after the end came {line!r}")
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            end = "done"
            continue
        try:
            event = json.loads(data)
        except ValueError:  # the last one, of a connection that was cut
            break
        if "error" in event:
            end = event["error"]["code"]
        else:
            text += "".join(choice["text"] for choice in event["choices"])
    return text, end


@dataclass
class Chaos:
    """Who calls ``address``, seeded. ``counts`` says what came of it."""

    address: tuple[str, int]
    rng: random.Random
    allowed_errors: frozenset[str] = frozenset({"internal_error"})
    counts: Counter[str] = field(default_factory=Counter)

    @contextlib.asynccontextmanager
    async def connected(self, receive_buffer: int | None = None):
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(sock, self.address)
        reader, writer = await asyncio.open_connection(sock=sock, limit=2**14)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def whole(self, path: str, body: Any = None, method: str = "POST") -> tuple[int, bytes]:
        """A request that is answered to its end."""
        async with asyncio.timeout(TIMEOUT_S), self.connected() as (reader, writer):
            writer.write(request_bytes(path, body, method))
            raw = await reader.read(-1)
        head, _, content = raw.partition(b"\r\n\r\n")
        return int(head.split()[1]), content

    def question(self, max_tokens: int) -> tuple[dict[str, Any], str]:
        """A streamed request, some of them with a prefix that others have; and its answer."""
        rng = self.rng
        shared = [65 + rng.randrange(3)] * rng.choice((0, 40, 200))
        prompt = [*shared, *(rng.randrange(97, 123) for _ in range(rng.randrange(1, 120)))]
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        return body, solo_text(prompt, max_tokens)

    async def honest(self, *, pause_s: float = 0.0, max_tokens: int | None = None) -> None:
        """Reads to the end, with a pause in the middle, and checks every byte."""
        body, expected = self.question(max_tokens or self.rng.randrange(1, 200))
        async with asyncio.timeout(TIMEOUT_S):
            async with self.connected(None if not pause_s else 4096) as (reader, writer):
                writer.write(request_bytes("/v1/completions", body))
                raw = await reader.read(2048)
                await asyncio.sleep(pause_s)
                raw += await reader.read(-1)
        status = int(raw.split(None, 2)[1])
        if status != 200:
            if status not in (408, 429, 503):  # in a crowd some come to speak too late
                raise BrokenPromiseError(raw.decode())
            self.counts[f"refused with {status}"] += 1
            return
        text, end = text_of(raw)
        if end == "done":
            if text != expected:
                raise BrokenPromiseError(f"{text!r} instead of {expected!r}")
        elif end not in self.allowed_errors or not expected.startswith(text):
            raise BrokenPromiseError(f"ended with {end!r} after {text!r}, due was {expected!r}")
        self.counts[f"ended: {end}"] += 1

    async def killer(self) -> None:
        """Leaves in the middle, by a reset."""
        body, expected = self.question(1000)
        async with asyncio.timeout(TIMEOUT_S), self.connected() as (reader, writer):
            writer.write(request_bytes("/v1/completions", body))
            raw = b""
            for _ in range(self.rng.randrange(4)):
                raw += await reader.read(1024)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        if not expected.startswith(text_of(raw)[0]):
            raise BrokenPromiseError(raw.decode())
        self.counts["killed"] += 1

    async def staller(self) -> None:
        """Asks for much, reads nothing for a while, and leaves."""
        body, _ = self.question(2000)
        async with asyncio.timeout(TIMEOUT_S), self.connected(4096) as (_, writer):
            writer.write(request_bytes("/v1/completions", body))
            await asyncio.sleep(self.rng.uniform(0.5, 1.5))
        self.counts["stalled"] += 1

    async def half_sender(self) -> None:
        """Sends a part of a request, and leaves, or waits until it is thrown out."""
        raw = request_bytes("/v1/completions", self.question(10)[0])
        part = raw[: self.rng.randrange(1, len(raw))]
        async with asyncio.timeout(TIMEOUT_S), self.connected() as (reader, writer):
            writer.write(part)
            if self.rng.random() < 0.3:
                answer = await reader.read(-1)
                if not answer.startswith(b"HTTP/1.1 408 "):
                    raise BrokenPromiseError(f"{part!r} was answered {answer!r}")
        self.counts["sent half"] += 1

    async def dropper(self) -> None:
        """Connects and leaves."""
        async with asyncio.timeout(TIMEOUT_S), self.connected():
            pass
        self.counts["dropped"] += 1

    async def babbler(self) -> None:
        """Sends what is no request, or one that is refused."""
        rng = self.rng
        raw = rng.choice(
            (
                rng.randbytes(rng.randrange(1, 2000)),
                request_bytes("/v1/completions", {"prompt": [10**9], "max_tokens": 1}),
                request_bytes("/v1/chat/completions", {"messages": "no"}),
                request_bytes("/v1/nothing", {}),
                b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000,
            )
        )
        async with asyncio.timeout(TIMEOUT_S), self.connected() as (reader, writer):
            writer.write(raw)
            with contextlib.suppress(ConnectionError):
                answer = await reader.read(-1)
                if answer and not answer.startswith(b"HTTP/1.1 4"):
                    raise BrokenPromiseError(f"{raw[:200]!r} was answered {answer!r}")
        self.counts["babbled"] += 1

    async def fault(self, kind: str, **how: Any) -> None:
        """Asks the server to go wrong."""
        status = 408
        while status == 408:
            status, content = await self.whole("/debug/inject_fault", {"kind": kind, **how})
        if status != 200:
            raise BrokenPromiseError(content.decode())
        self.counts[kind] += 1

    async def samples(self) -> dict[str, float]:
        """/metrics: the last sample of each name."""
        _, content = await self.whole("/metrics", method="GET")
        rows = [line.rsplit(" ", 1) for line in content.decode().splitlines() if line[:1] != "#"]
        return {row[0].split("{")[0]: float(row[1]) for row in rows if len(row) == 2}

    async def until_running(self, count: int) -> None:
        """Wait until so many requests run at once."""
        async with asyncio.timeout(TIMEOUT_S):
            while (await self.samples())["streamserve:num_requests_running"] < count:
                pass

    async def until_idle(self) -> dict[str, float]:
        """Wait until nothing runs; the metrics then."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                found = await self.samples()
                names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
                if not any(found[f"streamserve:{name}"] for name in names):
                    return found
                await asyncio.sleep(0.05)
