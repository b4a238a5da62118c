"""The time of one call: launch overhead left out, inputs not in a cache from the call before.

The caller gives several calls that do the same work on different memory, together more than the
caches hold. On a GPU they are captured into a graph, repeated until a replay takes about a
millisecond; what cannot be captured is launched one by one, and the result says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# Three times the second-level cache of an H100 or H200.
ROTATED_BYTES = 150 * 10**6
_MOST_COPIES = 64
_REPLAY_S = 3e-3  # launched one by one; as a graph it may be a tenth
_MOST_LAUNCHES = 1000  # in one graph
_LEAST_REPLAYS, _MOST_REPLAYS = 5, 200


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of one call, and how it was launched: `graph`, `eager` or `host`."""

    seconds: float
    method: str


def num_copies(num_bytes: float, rotated_bytes: float = ROTATED_BYTES) -> int:
    """Sets of buffers that a round needs, each of so many bytes."""
    return max(1, min(_MOST_COPIES, -(-int(rotated_bytes) // max(1, int(num_bytes)))))


def time_calls(calls: Sequence[Call], device: torch.device, seconds: float) -> Timing:
    """Times calls that do the same work; takes about `seconds`, and compilations."""
    if device.type != "cuda":
        return Timing(_on_host(calls, seconds), "host")
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    pass_s = _events([lambda: _run(calls)], 1)[0]
    num_passes = max(1, min(int(_REPLAY_S / max(pass_s, 1e-6)) + 1, _MOST_LAUNCHES // len(calls)))
    launch, method = _captured(calls, num_passes), "graph"
    if launch is None:
        launch, method, num_passes = (lambda: _run(calls)), "eager", 1
    launch()
    estimate = _events([launch], 1)[0]
    num_replays = max(_LEAST_REPLAYS, min(_MOST_REPLAYS, int(seconds / max(estimate, 1e-6))))
    taken = statistics.median(_events([launch], num_replays))
    return Timing(taken / (num_passes * len(calls)), method)


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _captured(calls: Sequence[Call], num_passes: int) -> Call | None:
    """A graph of all calls, several times over; None where they ask the host for something."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _run(calls)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        _capture(graph, stream, lambda: [_run(calls) for _ in range(num_passes)])
    except Exception:
        torch.cuda.synchronize()  # raises what has broken the device for good
        # The generator believes that a capture goes on, until one has ended well.
        _capture(torch.cuda.CUDAGraph(), stream, lambda: torch.empty(1, device="cuda").zero_())
        return None
    return graph.replay


def _capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, work: Call) -> None:
    """As `torch.cuda.graph`, which collects garbage each time: seconds, over a table."""
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            work()
        finally:
            graph.capture_end()


def _events(launches: Sequence[Call], rounds: int) -> list[float]:
    """Seconds on the device of each launch, all queued before any is waited for."""
    pairs = []
    for _ in range(rounds):
        for launch in launches:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launch()
            end.record()
            pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def _on_host(calls: Sequence[Call], seconds: float) -> float:
    for call in calls[:2]:
        call()
    taken = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        started = time.perf_counter()
        _run(calls)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken) / len(calls)
