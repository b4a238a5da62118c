"""Random paged caches for the kernel tests: shuffled block tables, NaN wherever nothing is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from streamserve_kernels import QUANTIZATIONS, Kernels, load
from streamserve_kernels.native.library import runnable_builds, why_not
from tests.kernels.bounds import within_bounds
from tests.kernels.pretended_gpu import HAS_GPU, IS_PRETENDED, OnCpu
from tests.native_builds import native_build

IS_INTERPRETED = find_spec("triton") is not None and not HAS_GPU
# Made while no GPU is pretended: a test that chooses sizes by a device's type gets a GPU's.
_DEVICES = {name: torch.device(name) for name in ("cpu", "cuda")}
TOLERANCE = {
    torch.float32: {"atol": 2e-6, "rtol": 1e-5},
    # one rounding of the result, and of the operands inside flash attention
    torch.bfloat16: {"atol": 1e-2, "rtol": 2e-2},
    torch.float16: {"atol": 2e-3, "rtol": 4e-3},
}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor starts as NaN, so an output that is not fully written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device` is where a Triton kernel is tried; with a `dtype`, also in what it is tried there.

    In float32 under the interpreter, and in both dtypes of half the size on a GPU.
    """
    if "each_build" in metafunc.fixturenames:
        asked_for = metafunc.config.getoption("--native-build")
        if builds := (asked_for,) if asked_for else runnable_builds():
            metafunc.parametrize("each_build", builds, indirect=True, scope="session")
    if "device" not in metafunc.fixturenames:
        return
    marks = list(metafunc.definition.iter_markers("parametrize"))
    if "dtype" in metafunc.fixturenames and not any(mark.args[0] == "dtype" for mark in marks):
        places = [
            pytest.param("cpu", torch.float32, id="cpu"),
            pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu, id="cuda"),
            pytest.param("cuda", torch.float16, marks=pytest.mark.gpu, id="cuda-float16"),
        ]
        metafunc.parametrize(("device", "dtype"), places, indirect=["device"])
    else:
        gpu = pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("device", ["cpu", gpu], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Under the interpreter, or on a GPU where there is one."""
    pytest.importorskip("triton")
    if request.param == "cpu" and (HAS_GPU or IS_PRETENDED):
        pytest.skip("the interpreter is not used beside a GPU")
    return _DEVICES[request.param]


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """See `bounds`."""
    with within_bounds() if IS_INTERPRETED else nullcontext():
        yield


@pytest.fixture(autouse=True)
def pretended() -> Iterator[None]:
    """See `pretended_gpu`."""
    with OnCpu() if IS_PRETENDED else nullcontext():
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Whatever ran before, a test draws the same numbers."""
    torch.manual_seed(0)


@pytest.fixture(params=QUANTIZATIONS)
def quantization(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def naive() -> Kernels:
    return load("cpu", "naive")


@pytest.fixture(scope="session")
def cpu() -> Kernels:
    return load("cpu", "cpu")


@pytest.fixture(scope="session")
def each_build(request: pytest.FixtureRequest) -> Iterator[None]:
    with native_build(getattr(request, "param", None)):
        yield


@pytest.fixture(scope="session")
def native(each_build: None) -> Kernels:
    """Each build that this CPU runs, for those who name it; the best for who asks in the test."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    return load("cpu", "native")


def dtype_on(device: torch.device) -> torch.dtype:
    """What shows every index right under the interpreter, and what a GPU is for."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def amid_nan(tensor: Tensor) -> Tensor:
    """The same numbers, with NaN before and behind them in memory."""
    margin = 4096
    around = tensor.new_full((tensor.numel() + 2 * margin,), float("nan"))
    inner = around[margin:-margin].view(tensor.shape)
    inner.copy_(tensor)
    return inner


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Paged:
    """One attention call: arguments in the order of `paged_attention`, and the dense sequences."""

    args: tuple[Tensor, ...]
    keys: list[Tensor]  # of each request [L, Hkv, D]
    values: list[Tensor]
    queries: list[Tensor]  # of each request [q, Hq, D]


def paged_case(
    naive: Kernels,
    *,
    seed: int,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_size: int,
    requests: list[tuple[int, int]],
    block_size: int = 16,
    value_size: int | None = None,
    padding_rows: int = 0,
) -> Paged:
    """Requests are (sequence length, queries). Unused slots and spare blocks hold NaN."""
    random = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    value_size = value_size or head_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    most_blocks = max(-(-length // block_size) for length, _ in requests) + 1
    num_blocks = len(requests) * most_blocks + 2
    shape = naive.kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size)
    key_cache = torch.full(shape, float("nan"), dtype=dtype)
    value_cache = torch.full((*shape[:3], value_size), float("nan"), dtype=dtype)
    shuffled = torch.randperm(num_blocks, generator=random)[: len(requests) * most_blocks]
    table = shuffled.view(len(requests), most_blocks).int()
    keys, values, queries = [], [], []
    for r, (length, count) in enumerate(requests):
        j = torch.arange(length)
        slots = table[r, j // block_size].long() * block_size + j % block_size
        keys.append(normal(length, num_kv_heads, head_size))
        values.append(normal(length, num_kv_heads, value_size))
        queries.append(normal(count, num_heads, head_size))
        naive.write_kv(keys[r], values[r], key_cache, value_cache, slots)
        table[r, -(-length // block_size) :] = -1  # never to be read
    padding = torch.full((padding_rows, num_heads, head_size), float("nan"), dtype=dtype)
    starts = torch.tensor([0] + [count for _, count in requests]).cumsum(0).int()
    return Paged(
        args=(
            torch.cat([*queries, padding]),
            key_cache,
            value_cache,
            table,
            torch.tensor([length for length, _ in requests], dtype=torch.int32),
            starts,
        ),
        keys=keys,
        values=values,
        queries=queries,
    )


def native_args(native: Kernels, case: Paged) -> tuple[Tensor, ...]:
    """The arguments of a case with its caches in the native order; unused slots hold NaN."""
    query, key_cache, value_cache, table, lens, starts = case.args
    key, value = (torch.full_like(cache, float("nan")) for cache in (key_cache, value_cache))
    size = key_cache.shape[2]
    for r, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        j = torch.arange(keys.shape[0])
        native.write_kv(keys, values, key, value, table[r, j // size].long() * size + j % size)
    return query, key, value, table, lens, starts
