"""How late everybody's next token is while long prompts come.

    python -m loadtest.lateness                      # a server without a model, a token every 10 ms
    python -m loadtest.lateness --url http://127.0.0.1:8000 --model box
    python -m loadtest.lateness --streams 256 --step-ms 7.5 --steps-in-flight 2 --prompts 0

Steady streams are read on raw sockets, and long prompts are sent one after the other. A token is
late by what its gap has beyond the median of the same streams before. With ``--url`` of a server
that has a model, prompts longer than its context are refused after they were tokenised: what is
measured then is the front, beside a model that takes its cores.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from loadtest.null_server import MODEL_NAME

_ROOT = Path(__file__).parents[1]
_BOX = _ROOT / "streamserve" / "assets" / "box"
_WORDS = ("the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on")
_SIZES = {"long": (1, 100_000), "messages": (2_000, 70)}  # messages, characters of each
_KINDS = ("long, new", "long, again", "messages, new", "messages, again")
_PAUSE_S = 0.05

Chat = list[dict[str, str]]


class Streams(threading.Thread):
    """Reads ``num_streams`` answers, again and again, and notes when each of their pieces came."""

    def __init__(self, url: str, model: str, num_streams: int, max_tokens: int) -> None:
        super().__init__(name="lateness-streams", daemon=True)
        self.times: list[list[float]] = []
        self._has_stopped = threading.Event()
        self._sockets: list[socket.socket] = []
        self._payloads: list[bytes] = []
        address = urlsplit(url)
        assert address.hostname is not None
        for i in range(num_streams):
            body = {
                "model": model,
                "messages": [{"role": "user", "content": f"Tell me a story about {i}."}],
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "stream": True,
            }
            sock = socket.create_connection((address.hostname, address.port or 80))
            self._sockets.append(sock)
            self._payloads.append(_request_bytes(address.netloc, body))
            self.times.append([])

    def run(self) -> None:
        """Read until ``stop``."""
        selector = selectors.DefaultSelector()
        for sock, payload, times in zip(self._sockets, self._payloads, self.times, strict=True):
            sock.sendall(payload)
            selector.register(sock, selectors.EVENT_READ, (times, payload))
        while not self._has_stopped.is_set():
            for key, _ in selector.select(0.1):
                now = time.perf_counter()
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                if not data:
                    raise ConnectionError("the server closed a stream")
                times, payload = key.data
                times.extend([now] * data.count(b"data: "))
                if data.endswith(b"0\r\n\r\n"):
                    times.append(math.nan)  # no gap reaches over the end of an answer
                    key.fileobj.sendall(payload)  # type: ignore[union-attr]
        for sock in self._sockets:
            sock.close()

    def stop(self) -> None:
        """Close all connections."""
        self._has_stopped.set()
        self.join()

    def gaps(self, start: float, end: float) -> list[float]:
        """Seconds before each piece that came between two moments."""
        found: list[float] = []
        for times in self.times:
            pairs = pairwise(times)
            found += [after - before for before, after in pairs if start <= before and after <= end]
        return found


def _request_bytes(host: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def chats(kind: str, rng: random.Random, count: int) -> Iterator[Chat]:
    """``count`` prompts of a kind; ``again`` are of one conversation, the others all new."""
    num_messages, num_characters = _SIZES[kind.split(",", maxsplit=1)[0]]
    kept: Chat | None = None
    for _ in range(count):
        if kept is None or "again" not in kind:
            kept = [
                {"role": ("user", "assistant")[i % 2], "content": _text(rng, num_characters)}
                for i in range(num_messages)
            ]
        yield kept


def _text(rng: random.Random, num_characters: int) -> str:
    return " ".join(rng.choices(_WORDS, k=num_characters // 4))[:num_characters]


def chat_body(model: str, messages: Chat) -> bytes:
    """What asks for one token."""
    return json.dumps({"model": model, "messages": messages, "max_tokens": 1}).encode()


def send(url: str, content: bytes) -> tuple[int, float]:
    """Status of one chat, and seconds to its answer."""
    address = urlsplit(url)
    assert address.hostname is not None
    started = time.perf_counter()
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    connection.request(
        "POST", "/v1/chat/completions", content, {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, time.perf_counter() - started


def measure(url: str, model: str, args: argparse.Namespace) -> None:
    """Print one line for each kind of prompt."""
    streams = Streams(url, model, args.streams, args.max_tokens)
    streams.start()
    rng = random.Random(args.seed)
    time.sleep(1.0)
    start = time.perf_counter()
    time.sleep(args.alone_s)
    alone = streams.gaps(start, time.perf_counter())
    usual = median(alone)
    print(f"{args.streams} streams alone: {_row(alone, usual)}; a token every {usual * 1e3:.2f} ms")
    for kind in _KINDS if args.prompts else ():
        # Made before: whoever reads the streams must not wait for this process's own work.
        prepared = [chat_body(model, chat) for chat in chats(kind, rng, args.prompts)]
        start = time.perf_counter()
        answers = []
        for content in prepared:
            answers.append(send(url, content))
            time.sleep(_PAUSE_S)
        gaps = streams.gaps(start, time.perf_counter())
        statuses = sorted({status for status, _ in answers})
        first = median(seconds for _, seconds in answers)
        print(
            f"{kind:15s} {_row(gaps, usual)}; answer {statuses} after {first * 1e3:.0f} ms",
            flush=True,
        )
    streams.stop()


def _row(gaps: Sequence[float], usual: float) -> str:
    late = sorted(max(gap - usual, 0.0) * 1e3 for gap in gaps)
    p50, p99 = (late[int(len(late) * share)] for share in (0.5, 0.99))
    return f"late by {p50:.2f} / {p99:.2f} / {late[-1]:.2f} ms (p50, p99, max of {len(late)})"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a server, or one without a model that is started for it."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.lateness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", help="of a server that runs; without: one is started")
    parser.add_argument("--model", default=MODEL_NAME)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=100_000, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=10.0, help="of the server without a model")
    parser.add_argument(
        "--steps-in-flight", type=int, default=1, help="of the server without a model; 2: as a GPU"
    )
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=512, help="of the server without a model"
    )
    parser.add_argument("--prompts", type=int, default=20, help="of each kind; 0: none")
    parser.add_argument("--alone-s", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.url is not None:
        measure(args.url, args.model, args)
        return 0
    command = [sys.executable, "-m", "loadtest.null_server", "--port", "0"]
    command += ["--step-ms", str(args.step_ms), "--tokenizer", str(_BOX)]
    command += ["--max-num-batched-tokens", str(args.max_num_batched_tokens)]
    command += ["--max-num-seqs", str(args.streams + 1)]
    command += ["--steps-in-flight", str(args.steps_in_flight)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError("the server did not start")
        measure(url, args.model, args)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)
    return 0


if __name__ == "__main__":
    sys.exit(main())
