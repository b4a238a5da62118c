"""Puts the fake device where torch and Triton look for one. For a process of its own."""

from __future__ import annotations

import importlib
import threading
from contextlib import AbstractContextManager
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tests.fake_cuda import tensors
from tests.fake_cuda.device import CaptureError, Clock, FakeDevice, Graph, Stream
from tests.kernels.absent_gpu import resources

CAPABILITY = (9, 0)
NAME = "NVIDIA H200 (absent)"
_current = threading.local()
# Kernels whose first arguments are only read, or are parts of caches that the plan keeps apart.
_READ_BY_BOTH = {"_rows_kernel": 3}
_recorded_to: set[Any] = set()  # pools; one whose capture has failed stays, as with torch
_pools = count(1)
compiled: dict[str, Any] = {}  # what was met of each kernel, by its whole key


def install(index: int = 1, *, compile_with: Any = None) -> FakeDevice:
    """Makes `cuda:index` of this process the fake one.

    Without ``compile_with``, which is given each kernel and what it was compiled to, none is.
    """
    assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET is set"
    device = tensors.device = FakeDevice(index)
    for name, value in vars(_Cuda(device)).items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = torch.version.cuda or "13.0"
    torch.Generator = _Generator  # type: ignore[misc]
    torch._C._host_emptyCache = lambda: None
    torch._C._cuda_clearCublasWorkspaces = device.clear_work_spaces
    torch.Tensor.pin_memory = lambda self, *_: tensors.pin(self)  # type: ignore[method-assign]
    torch.Tensor.is_pinned = lambda self, *_: tensors.is_pinned(self)  # type: ignore[method-assign]
    torch.Tensor.to = _indexed(torch.Tensor.to)  # type: ignore[method-assign]
    torch.tensor = _made_then_moved(torch.tensor)
    torch.as_tensor = _made_then_moved(torch.as_tensor)
    _enter_on_every_thread()
    triton.runtime.driver.set_active(_Driver(device))
    _intercept(device, compile_with)
    # Kernels write nothing here, and all take as long: the first candidate is chosen.
    tuning: Any = importlib.import_module("streamserve_kernels.triton.tuning")
    tuning.agree, tuning._MOST_CALLS = lambda *_: True, 0
    return device


def _enter_on_every_thread() -> None:
    tensors.Dispatch().__enter__()
    run = threading.Thread.run

    def run_with(self: threading.Thread) -> None:
        with tensors.Dispatch():
            run(self)

    threading.Thread.run = run_with  # type: ignore[method-assign]


def _indexed(to: Any) -> Any:
    """C++ asks the driver which device `cuda` is."""

    def named(which: Any) -> Any:
        is_named = isinstance(which, (str, torch.device)) and str(which) == "cuda"
        return torch.device("cuda", current_index()) if is_named else which

    def moved(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        options = {name: named(value) for name, value in options.items()}
        found: torch.Tensor = to(self, *map(named, args), **options)
        return found

    return moved


def _made_then_moved(make: Any) -> Any:
    """Which is what C++ does, where no dispatch sees it."""

    def made(data: Any, *, device: Any = None, **options: Any) -> Any:
        found = make(data, **options)
        return found if device is None else found.to(device)

    return made


def current_index() -> int:
    """Each thread's own."""
    found: int = getattr(_current, "index", 0)
    return found


class _Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._clock: Clock | None = None

    def record(self, stream: _Stream | None = None) -> None:
        device = tensors.device
        _check_thread("an event is recorded")
        into = device.current if stream is None else stream.stream
        if into.graph is not None:
            device.find("in a capture: an event is recorded")
        self._clock = dict(into.clock)

    def wait(self, stream: _Stream | None = None) -> None:
        (stream or _Stream(tensors.device.current)).wait_event(self)

    def synchronize(self) -> None:
        if self._clock is not None:
            tensors.device.wait(self._clock, "event")

    def query(self) -> bool:
        return self._clock is None or tensors.device.is_done(self._clock)

    def elapsed_time(self, other: _Event) -> float:
        for event in (self, other):
            if event._clock is None or not tensors.device.is_done(event._clock):
                raise RuntimeError("both events must be recorded and done")
        return 1.0

    @property
    def clock(self) -> Clock:
        return self._clock or {}


class _Stream:
    def __init__(self, stream: Any = None, **_: Any) -> None:
        # Made with a device, with nothing, or around one of ours.
        self.stream = stream if isinstance(stream, Stream) else tensors.device.new_stream()
        self.cuda_stream = self.stream.number
        self.device = torch.device("cuda", tensors.device.index)

    def wait_event(self, event: _Event) -> None:
        for number, place in event.clock.items():
            self.stream.clock[number] = max(self.stream.clock.get(number, 0), place)

    def wait_stream(self, other: _Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event._clock = dict(self.stream.clock)
        return event

    def synchronize(self) -> None:
        tensors.device.wait(dict(self.stream.clock), "stream")


class _OnStream:
    """`torch.cuda.stream`, which is entered and left by hand too."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = tensors.device.current
        tensors.device.set_stream(self._stream.stream)

    def __exit__(self, *_: object) -> None:
        tensors.device.set_stream(self._before)


class _CudaGraph:
    def __init__(self, keep_graph: bool = False) -> None:
        self._graph = Graph()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if capture_error_mode == "global":
            tensors.device.find("a capture that other threads spoil")
        if pool in _recorded_to:
            raise RuntimeError(f"beginAllocateToPool: already recording to mempool_id {pool}")
        self._pool = pool
        _recorded_to.add(pool)
        tensors.device.capture_begin(self._graph)

    def capture_end(self) -> None:
        tensors.device.capture_end()
        if self._graph.is_invalid:
            raise CaptureError("operation failed due to a previous error during capture")
        _recorded_to.discard(self._pool)

    def replay(self) -> None:
        _check_thread("a graph is replayed")
        tensors.device.replay(self._graph)


class _Capture:
    """`torch.cuda.graph`, as torch 2.11 has it."""

    default: _Stream | None = None

    def __init__(
        self, graph: _CudaGraph, pool: Any = None, stream: Any = None, **options: Any
    ) -> None:
        if type(self).default is None:
            type(self).default = _Stream()
        self._stream: AbstractContextManager[None] = _OnStream(stream or type(self).default)
        self._graph, self._pool, self._options = graph, pool, options

    def __enter__(self) -> None:
        tensors.device.synchronize()
        self._stream.__enter__()
        self._graph.capture_begin(self._pool, **self._options)

    def __exit__(self, *details: Any) -> None:
        self._graph.capture_end()
        self._stream.__exit__(*details)


class _Cudart:
    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        tensors.registered[address] = address + num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        if tensors.registered.pop(address, None) is None:
            tensors.device.find("memory is unpinned that was not pinned")
        return 0


class _Cuda:
    """The names of `torch.cuda` that are replaced."""

    def __init__(self, device: FakeDevice) -> None:
        def set_device(which: Any) -> None:
            _current.index = torch.device(which).index if not isinstance(which, int) else which

        def reset_peak(_: Any = None) -> None:
            device.peak_bytes = device.live_bytes

        context_bytes = 500 * 2**20
        self._lazy_init = lambda: None
        self.is_available = lambda: True
        self.is_initialized = lambda: True
        self.device_count = lambda: device.index + 1
        self.get_device_name = lambda *_: NAME
        self.get_device_capability = lambda *_: CAPABILITY
        self.get_device_properties = lambda *_: SimpleNamespace(
            name=NAME, multi_processor_count=132, total_memory=device.total_bytes, major=9, minor=0
        )
        self.current_device = current_index
        self.set_device = set_device
        self.synchronize = lambda *_: device.synchronize()
        self.Event = _Event
        self.Stream = _Stream
        self.stream = _OnStream
        self.current_stream = lambda *_: _Stream(device.current)
        self.default_stream = lambda *_: _Stream(device._streams[0])
        self.CUDAGraph = _CudaGraph
        self.graph = _Capture
        self.graph_pool_handle = lambda: (0, next(_pools))
        self.is_current_stream_capturing = lambda: device.current.graph is not None
        self.mem_get_info = lambda *_: (
            device.total_bytes - context_bytes - device.live_bytes,
            device.total_bytes,
        )
        self.memory_allocated = self.memory_reserved = lambda *_: device.live_bytes
        self.max_memory_allocated = self.max_memory_reserved = lambda *_: device.peak_bytes
        self.reset_peak_memory_stats = reset_peak
        self.empty_cache = lambda: None
        self.cudart = _Cudart


def _check_thread(what: str) -> None:
    if current_index() != tensors.device.index:
        tensors.device.find(f"{what} on the wrong device")


class _Generator(torch.Generator):
    """Of the CPU, whatever it is asked for."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls)


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return current_index()

    def get_current_stream(self, device: int | None = None) -> int:
        return self._device.current.number

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", current_index())


def _intercept(device: FakeDevice, compile_with: Any) -> None:
    run, compile_one = JITFunction.run, JITFunction._do_compile

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        _check_thread(f"{self._fn_name} is launched")
        if self.fn.__name__ in _READ_BY_BOTH:
            device.check_behind_main()
        used = []
        for tensor in tensors.tensors_in((args[_READ_BY_BOTH.get(self.fn.__name__, 0) :], options)):
            if isinstance(tensor, tensors.DeviceTensor):
                used.append(tensor.memory_)
            else:
                device.find(f"{self._fn_name} is given a tensor of the host")
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        device.queue("launch", self._fn_name.rpartition(".")[2], used)
        return kernel

    def compile_it(
        self: Any, key: Any, signature: Any, index: int, constexprs: Any, options: Any, attrs: Any,
        warmup: bool,
    ) -> Any:  # fmt: skip
        if device.current.graph is not None:
            device.find(f"in a capture: {self._fn_name} is compiled")
        compiled[f"{self._fn_name} {key}"] = (self, signature, constexprs, options, attrs)
        if compile_with is None:
            self.device_caches[index][0][key] = kernel = SimpleNamespace()
        else:
            try:
                kernel = compile_one(
                    self, key, signature, index, constexprs, options, attrs, warmup
                )
                compile_with(self, kernel)
            except Exception as error:
                device.find(f"{self._fn_name} does not compile: {str(error)[:300]}")
                self.device_caches[index][0][key] = kernel = SimpleNamespace()
        return kernel

    JITFunction.run, JITFunction._do_compile = launch, compile_it


class Compiler:
    """Looks at what was compiled for Hopper; what does not fit there is a finding."""

    def __init__(self) -> None:
        self.num_compiled = 0

    def __call__(self, function: Any, kernel: Any) -> None:
        self.num_compiled += 1
        used = resources(kernel)
        if used["stack"] > 256 or used["shared"] > 227 * 1024:
            tensors.device.find(f"{function._fn_name} takes {used}")


def backend() -> Any:
    """The Triton backend."""
    return importlib.import_module("streamserve_kernels.triton")
