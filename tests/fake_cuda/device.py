"""What a GPU would be told, in order: streams, events, copies, launches, captures.

Nothing runs later than it is queued, but the host is told only what it has waited for. A queued
copy out of pinned memory must find there, when the host learns that it is done, what lay there when
it was queued; a copy into pinned memory lies there from then on and not earlier. Streams have
vector clocks, so that memory which one of them frees while another uses it is seen.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from weakref import WeakSet

ROOT = str(Path(__file__).parents[2])
_PRODUCTS = {"aten::linear", "aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm"}
Clock = dict[int, int]  # by stream: how many of its operations


class CaptureError(RuntimeError):
    """What CUDA says of things that are not permitted while a stream is captured."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that the device, or its driver, was asked for."""

    kind: str  # launch, kernel, h2d, d2h, blocking h2d, blocking d2h, wait, sync, capture, replay
    name: str
    thread: str
    stream: int

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(eq=False)
class Allocation:
    """Memory of the device; freed when nothing refers to it."""

    device: FakeDevice
    serial: int
    num_bytes: int
    stream: int
    graph: Graph | None
    uses: Clock = field(default_factory=dict)

    def __del__(self) -> None:
        self.device.freed(self)


@dataclass(eq=False)
class Stream:
    """A queue of the device."""

    number: int
    clock: Clock = field(default_factory=dict)
    graph: Graph | None = None  # being captured


@dataclass(eq=False)
class Graph:
    """What was captured: the memory that it works on and does not own."""

    entries: list[Entry] = field(default_factory=list)
    is_invalid: bool = False
    outside: dict[int, str] = field(default_factory=dict)  # by the serial number of an allocation


@dataclass(frozen=True, slots=True)
class _Pending:
    stream: int
    place: int
    arrive: Callable[[], None]


class FakeDevice:
    """One device. Everything may be called from any thread."""

    def __init__(self, index: int, total_bytes: int = 80 * 2**30) -> None:
        self.index = index
        self.total_bytes = total_bytes
        self.log: list[Entry] = []
        self.findings: Counter[str] = Counter()
        self.live_bytes = self.peak_bytes = 0
        self.graphs: WeakSet[Graph] = WeakSet()
        self.work_spaces: set[int] = set()  # cuBLAS's, by stream
        self.fail_when: Callable[[str], BaseException | None] = lambda name: None
        self._lock = threading.RLock()
        self._done: Clock = {}  # what the host knows to be done
        self._pending: list[_Pending] = []
        self._streams: dict[int, Stream] = {0: Stream(0)}
        self._local = threading.local()
        self._alive: set[int] = set()
        self._serials = count()

    # -- threads and streams

    @property
    def current(self) -> Stream:
        """The calling thread's stream."""
        found: Stream = getattr(self._local, "stream", self._streams[0])
        return found

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        """Like `torch.cuda.stream`."""
        before = self.current
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    def set_stream(self, stream: Stream) -> None:
        self._local.stream = stream

    def new_stream(self) -> Stream:
        with self._lock:
            number = len(self._streams)
            self._streams[number] = Stream(number)
            return self._streams[number]

    # -- what is queued

    def queue(
        self,
        kind: str,
        name: str,
        used: list[Allocation] | tuple[Allocation, ...] = (),
        arrive: Callable[[], None] | None = None,
    ) -> None:
        """Notes an operation of the current stream. ``arrive``: when the host knows of its end."""
        if (error := self.fail_when(name)) is not None:
            try:
                raise error
            finally:
                del error  # it has this frame
        with self._lock:
            stream = self.current
            self._note(kind, name, stream)
            if name in _PRODUCTS:
                self.work_spaces.add(stream.number)
            if stream.graph is not None:
                if kind not in ("kernel", "launch"):
                    self._spoil(stream.graph, f"{kind} {name}")
                    raise CaptureError("operation not permitted when stream is capturing")
                for allocation in used:
                    if allocation.graph is None:
                        stream.graph.outside[allocation.serial] = name
                return
            place = stream.clock.get(stream.number, 0) + 1
            stream.clock[stream.number] = place
            for allocation in used:
                self._use(allocation, stream, place)
            if arrive is not None:
                self._pending.append(_Pending(stream.number, place, arrive))

    def _use(self, allocation: Allocation, stream: Stream, place: int) -> None:
        for other, at in allocation.uses.items():
            if other == stream.number or stream.clock.get(other, 0) >= at:
                continue
            if self._done.get(other, 0) < at:
                self.find(f"streams {other} and {stream.number} are not in order", frames=6)
        allocation.uses[stream.number] = place

    def wait(self, clock: Clock, name: str) -> None:
        """The host waits for all that ``clock`` counts."""
        with self._lock:
            if self.current.graph is not None:
                self._spoil(self.current.graph, f"waits for {name}")
                raise CaptureError("operation not permitted when stream is capturing")
            if any(self._done.get(number, 0) < place for number, place in clock.items()):
                self._note("wait", name, self.current)
            for number, place in clock.items():
                self._done[number] = max(self._done.get(number, 0), place)
            arrived = [p for p in self._pending if self._done.get(p.stream, 0) >= p.place]
            self._pending = [p for p in self._pending if self._done.get(p.stream, 0) < p.place]
            # Under the lock: whoever waits for the same on another thread may read it then.
            for pending in arrived:
                pending.arrive()

    def lose(self) -> None:
        """Nothing that was queued ever ends: what is copied is kept for nobody."""
        with self._lock:
            self._pending.clear()

    def blocks(self, name: str) -> None:
        """The host waits until the current stream is idle, as a copy of pageable memory does."""
        self.wait(dict(self.current.clock), name)

    def synchronize(self, name: str = "device") -> None:
        with self._lock:
            clock: Clock = {}
            for stream in self._streams.values():
                clock[stream.number] = stream.clock.get(stream.number, 0)
        self.wait(clock, name)

    def check_behind_main(self) -> None:
        """What the current stream is given comes behind all that the main stream has."""
        self._check_order(self._streams[0], self.current)

    def check_joined(self) -> None:
        """What the main stream is given from here on comes behind all that others have."""
        for stream in self._streams.values():
            self._check_order(stream, self._streams[0])

    def _check_order(self, before: Stream, after: Stream) -> None:
        place = before.clock.get(before.number, 0)
        if max(after.clock.get(before.number, 0), self._done.get(before.number, 0)) < place:
            self.find(f"stream {after.number} does not wait for stream {before.number}")

    def is_done(self, clock: Clock) -> bool:
        return all(self._done.get(number, 0) >= place for number, place in clock.items())

    # -- captures

    def capture_begin(self, graph: Graph) -> None:
        self._note("capture", "begin", self.current)
        self.current.graph = graph
        self.graphs.add(graph)

    def capture_end(self) -> None:
        self.current.graph = None
        self._note("capture", "end", self.current)

    def _spoil(self, graph: Graph, what: str) -> None:
        graph.is_invalid = True
        self.find(f"in a capture: {what}")

    def replay(self, graph: Graph) -> None:
        for serial, name in graph.outside.items():
            if serial not in self._alive:
                self.find(f"a graph uses memory that was freed: {name}")
        self.queue("replay", "graph")

    # -- memory

    def allocate(self, num_bytes: int) -> Allocation:
        with self._lock:
            stream = self.current
            serial = next(self._serials)
            found = Allocation(self, serial, num_bytes, stream.number, stream.graph)
            self._alive.add(serial)
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            return found

    def clear_work_spaces(self) -> None:
        """cuBLAS's, on every stream; graphs that were captured with one still write to it."""
        with self._lock:
            for graph in self.graphs:
                if any(entry.name in _PRODUCTS for entry in graph.entries):
                    self.find("a graph is left without cuBLAS's work space")
            self.work_spaces.clear()

    def freed(self, allocation: Allocation) -> None:
        with self._lock:
            self._alive.discard(allocation.serial)
            self.live_bytes -= allocation.num_bytes
            owner = self._streams[allocation.stream]
            for number, place in allocation.uses.items():
                if number == owner.number or owner.clock.get(number, 0) >= place:
                    continue
                if self._done.get(number, 0) < place:
                    self.find(f"freed on stream {owner.number} while stream {number} may use it")

    # -- notes

    def _note(self, kind: str, name: str, stream: Stream) -> None:
        entry = Entry(kind, name, threading.current_thread().name, stream.number)
        self.log.append(entry)
        if stream.graph is not None:
            stream.graph.entries.append(entry)

    def find(self, what: str, frames: int = 3) -> None:
        """Notes what is wrong, with where in our code it was."""
        self.findings[f"{what} [{where(frames)}]"] += 1


def where(frames: int = 3) -> str:
    """The innermost lines of our own code, the caller's last."""
    own = [
        f"{frame.filename.removeprefix(ROOT + '/')}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if frame.filename.startswith(ROOT) and "/fake_cuda/" not in frame.filename
    ]
    return " > ".join(own[-frames:])
