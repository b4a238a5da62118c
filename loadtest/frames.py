"""How many ``data:`` frames one core can send, and what one costs.

    python -m loadtest.frames

A server without a model (``loadtest.null_server``) is pinned to one core, this client to another.
It opens ``--streams`` chat completions on raw sockets and counts frames. Every token must come in
a frame of its own: a stream's text frames are counted against its own ``usage``.

``--profile FILE`` says where the time goes, room by room; the profiler itself doubles it.
"""

from __future__ import annotations

import argparse
import json
import os
import pstats
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.null_server import MODEL_NAME

_MARK = b"data: "
_RECEIVE_BYTES = 1 << 18
_TAIL_BYTES = 1024
_FRAMES_WITHOUT_TEXT = 4  # role, finish_reason, usage, [DONE]
_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Reader:
    """One connection: counts frames across the borders of what it receives."""

    sock: socket.socket
    num_frames: int = 0
    num_bytes: int = 0
    tail: bytes = b""

    def feed(self, data: bytes) -> None:
        """Count what starts in ``data`` or across its border."""
        border = self.tail[-(len(_MARK) - 1) :] + data[: len(_MARK) - 1]
        self.num_frames += data.count(_MARK) + border.count(_MARK)
        self.num_bytes += len(data)
        self.tail = (self.tail + data)[-_TAIL_BYTES:]

    @property
    def is_done(self) -> bool:
        """Whether the response has ended."""
        return self.tail.endswith(b"0\r\n\r\n")

    @property
    def num_tokens(self) -> int:
        """``completion_tokens`` of the usage that the stream ended with."""
        start = self.tail.index(b'"usage":{') + len(b'"usage":')
        usage = json.JSONDecoder().raw_decode(self.tail[start:].decode())[0]
        return int(usage["completion_tokens"])


@dataclass(slots=True)
class Result:
    """What was measured. ``seconds`` from the first body byte to the last."""

    num_streams: int
    num_frames: int
    num_tokens: int
    num_bytes: int
    seconds: float
    server_user_seconds: float
    server_system_seconds: float
    load_average: float
    merged: list[int] = field(default_factory=list)

    @property
    def frames_per_second(self) -> float:
        return self.num_frames / self.seconds

    @property
    def cpu_us_per_frame(self) -> float:
        return (self.server_user_seconds + self.server_system_seconds) / self.num_frames * 1e6

    @property
    def system_us_per_frame(self) -> float:
        return self.server_system_seconds / self.num_frames * 1e6


def request_bytes(num_tokens: int, host: str) -> bytes:
    """One streamed chat completion as HTTP/1.1."""
    body = json.dumps(
        {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def cpu_seconds(pid: int) -> tuple[float, float]:
    """User and system time of a process, from ``/proc``."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / tick, int(fields[12]) / tick


def wait_for_children(pid: int, seconds: float = 0.5) -> None:
    """Return when the processes that a server has started are idle: while they start, they share
    its core and its caches.
    """
    deadline = time.monotonic() + _TIMEOUT_S
    used, before = _children_seconds(pid), -1.0
    while used != before:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the children of the server are busy after {_TIMEOUT_S:g} s")
        time.sleep(seconds)
        used, before = _children_seconds(pid), used


def _children_seconds(pid: int) -> float:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return sum(sum(cpu_seconds(int(child))) for child in children)


def measure(url: str, pid: int, *, num_streams: int, num_tokens: int) -> Result:
    """Run ``num_streams`` streams at once and count."""
    address = urlsplit(url)
    assert address.hostname is not None
    selector = selectors.DefaultSelector()
    readers: list[Reader] = []
    for _ in range(num_streams):
        sock = socket.create_connection((address.hostname, address.port or 80))
        reader = Reader(sock)
        readers.append(reader)
        selector.register(sock, selectors.EVENT_READ, reader)
    payload = request_bytes(num_tokens, address.netloc)
    user_before, system_before = cpu_seconds(pid)
    for reader in readers:
        reader.sock.sendall(payload)
    num_open = num_streams
    started = 0.0
    while num_open:
        events = selector.select(_TIMEOUT_S)
        if not events:
            raise TimeoutError(f"no byte for {_TIMEOUT_S:g} s")
        for key, _ in events:
            reader = key.data
            data = reader.sock.recv(_RECEIVE_BYTES)
            if not data:
                raise ConnectionError(f"the server closed a stream: {reader.tail[-300:]!r}")
            reader.feed(data)
            if not started and reader.num_frames:
                started = time.perf_counter()
            if reader.is_done:
                selector.unregister(reader.sock)
                num_open -= 1
    seconds = time.perf_counter() - started
    user, system = cpu_seconds(pid)
    for reader in readers:
        reader.sock.close()
    return Result(
        num_streams=num_streams,
        num_frames=sum(r.num_frames for r in readers),
        num_tokens=sum(r.num_tokens for r in readers),
        num_bytes=sum(r.num_bytes for r in readers),
        seconds=seconds,
        server_user_seconds=user - user_before,
        server_system_seconds=system - system_before,
        load_average=os.getloadavg()[0],
        merged=[
            i
            for i, r in enumerate(readers)
            if r.num_frames - _FRAMES_WITHOUT_TEXT != r.num_tokens or r.num_tokens != num_tokens
        ],
    )


def start_server(core: int | None, num_streams: int, profile: str | None) -> subprocess.Popen[str]:
    """Start ``loadtest.null_server`` on ``core``; its first line of output is its URL."""
    command = [sys.executable, "-m", "loadtest.null_server", "--port", "0"]
    command += ["--max-num-seqs", str(num_streams)]
    if profile is not None:
        command += ["--profile", profile]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    return process


def pick_cores() -> tuple[int | None, int | None]:
    """The server's core and the client's; ``None`` where there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[1]) if len(cores) > 1 else (None, None)


def report(result: Result) -> str:
    """One paragraph for people."""
    return (
        f"{result.num_streams} streams, {result.num_tokens} tokens, {result.num_frames} frames "
        f"of {result.num_bytes / result.num_frames:.0f} bytes\n"
        f"{result.frames_per_second:,.0f} frames/s, "
        f"{result.cpu_us_per_frame:.2f} us of server CPU per frame "
        f"({result.system_us_per_frame:.2f} in the kernel), load {result.load_average:.1f}, "
        f"{'no frame merged' if not result.merged else f'MERGED in streams {result.merged}'}"
    )


def breakdown(profile: str) -> str:
    """Each file's share of the server's profiled time, own time of its functions and no more."""
    shares: Counter[str] = Counter()
    for (file, _, function), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        path = Path(file)
        shares["/".join(path.parts[-3:]) if path.suffix == ".py" else function] += own
    total = sum(shares.values())
    rows = [f"{seconds / total:6.1%}  {name}" for name, seconds in shares.most_common(16)]
    return "\n".join(rows)


def measure_server(num_streams: int, args: argparse.Namespace) -> list[Result]:
    """Start a server, measure ``args.repeats`` times, stop it."""
    server_core, client_core = pick_cores()
    if client_core is not None:
        os.sched_setaffinity(0, {client_core})
    process = start_server(server_core, num_streams, args.profile)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError("the server did not start")
        measure(url, process.pid, num_streams=num_streams, num_tokens=20)  # warm-up
        wait_for_children(process.pid)
        return [
            measure(url, process.pid, num_streams=num_streams, num_tokens=args.tokens)
            for _ in range(args.repeats)
        ]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)
        if client_core is not None:
            os.sched_setaffinity(0, {server_core, client_core})


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measurements; 1 if frames were merged or a floor was not reached."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.frames",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--tokens", type=int, default=1000, help="of each stream")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--at-least", type=float, default=0.0, help="frames/s the best must reach")
    parser.add_argument("--profile", help="write the server's cProfile into this file, and show it")
    args = parser.parse_args(argv)
    is_good = True
    for num_streams in args.streams:
        results = measure_server(num_streams, args)
        for result in results:
            print(report(result))
        if args.profile is not None:
            print(breakdown(args.profile))
        best = max(result.frames_per_second for result in results)
        is_good &= best >= args.at_least and not any(result.merged for result in results)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
