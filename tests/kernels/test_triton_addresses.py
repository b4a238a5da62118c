"""Offsets past 2^31 elements: in memory that is mapped, and touched in a few places only."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from streamserve_kernels import naive, naive_sampling, recurrent
from streamserve_kernels import triton as ours
from streamserve_kernels.adapters import AdapterRows
from streamserve_kernels.fp8 import quantise_fp8
from streamserve_kernels.recurrent import StepStates
from streamserve_kernels.routing import Routing
from streamserve_kernels.sampling import SamplingTensors
from streamserve_kernels.triton import recurrent as triton_recurrent
from streamserve_kernels.triton import sampling
from streamserve_kernels.triton.block_rows import TritonBlockRows
from streamserve_kernels.triton.fp8 import Fp8Linear
from streamserve_kernels.triton.linear import (
    PackedQuantLinear,
    prepare_linear,
    prepare_quantised,
)
from streamserve_kernels.triton.packed import WHOLE_ROW, PackedWeight
from streamserve_kernels.triton.runtime import INTERPRETED
from streamserve_kernels.triton.stored import PlanesLinear
from streamserve_kernels.triton.tuning import Config
from tests.kernels.conftest import paged_case
from tests.kernels.stored_cases import grouped

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the arithmetic is the same on a GPU")

STRIDE = 2**30  # fits int32; twice as much does not
N, K = 2**21 + 2, 1024  # of weights: the last two rows begin past 2^31
MAP_NORESERVE = 0x4000  # of Linux; Python 3.11 has no name for it
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def far(*shape: int, stride: int = STRIDE, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros whose first dimension has this stride. Below them lie zeros too, not a crash."""
    below = 2**31
    inner = torch.empty(shape[1:]).stride()
    count = below + (shape[0] - 1) * stride + int(np.prod(shape[1:]))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    whole = torch.frombuffer(pages, dtype=torch.uint8).view(dtype)
    return whole.as_strided(shape, (stride, *inner), below)


def spread(tensor: Tensor) -> Tensor:
    """The same numbers, the first dimension's 2^30 elements apart."""
    apart = far(*tensor.shape, dtype=tensor.dtype)
    for one, other in zip(apart, tensor, strict=True):
        one.copy_(other)
    return apart


@contextmanager
def only_some_programs(count: int, *, last: bool = True) -> Iterator[None]:
    """Of the first dimension of a grid: so many at its end, or at its beginning."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__
    builder = interpreter.interpreter_builder
    program_id, num_programs = builder.create_get_program_id, builder.create_get_num_programs
    skipped = left_out = 0

    def launch_some(executor, *args, **kwargs) -> None:
        nonlocal skipped, left_out
        length, *others = executor.grid
        executor.grid = (min(length, count), *others)
        left_out = length - executor.grid[0]
        skipped = left_out if last else 0
        launch(executor, *args, **kwargs)

    def added(found, number: int):
        return type(found)(found.data + np.int32(number), found.dtype)

    with (
        patch.object(interpreter.GridExecutor, "__call__", launch_some),
        patch.object(
            builder,
            "create_get_program_id",
            lambda axis: added(program_id(axis), 0 if axis else skipped),
        ),
        patch.object(
            builder,
            "create_get_num_programs",
            lambda axis: added(num_programs(axis), 0 if axis else left_out),
        ),
    ):
        yield


@contextmanager
def far_outputs() -> Iterator[None]:
    """Kernels write what is longer than 2^31 elements into memory that is hardly touched."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def made(make, dtype, shape, options):
        if np.prod(shape, dtype=np.int64) <= 2**31:
            return make(*shape, **options)
        return far(*shape, stride=int(np.prod(shape[1:])), dtype=dtype)

    with (
        patch.object(
            torch.Tensor,
            "new_empty",
            lambda like, *shape, **options: made(
                partial(new_empty, like), like.dtype, shape, options
            ),
        ),
        patch.object(
            torch,
            "empty",
            lambda *shape, **options: made(empty, options.get("dtype"), shape, options),
        ),
    ):
        yield


@pytest.mark.parametrize("most", [1, 40], ids=["decode", "chunk"])
def test_caches_and_queries_of_attention(naive, most, monkeypatch):
    from streamserve_kernels.triton import attention_plan

    monkeypatch.setattr(attention_plan, "FEW_ROWS", 0)
    case = paged_case(
        naive,
        seed=1,
        dtype=torch.float32,
        heads=(2, 1),
        head_size=16,
        requests=[(70, most), (33, 1)],
    )
    query, key_cache, value_cache, *rest = case.args
    expected = naive.paged_attention(*case.args, scale=0.2)
    apart = spread(query), spread(key_cache), spread(value_cache)
    found = ours.paged_attention(*apart, *rest, scale=0.2, max_query_len=most)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    ("length", "queries"), [(70, 20), (70, 1), (300, 1)], ids=["chunk", "decode", "merged"]
)
def test_outputs_of_attention(naive, length, queries):
    """Of the last request of a step, whose first one has a million queries that nobody computes."""
    many, heads, size, padding = 2**20, 8, 256, 60 - queries
    case = paged_case(
        naive,
        seed=1,
        dtype=torch.float32,
        heads=(heads, 1),
        head_size=size,
        block_size=16,
        requests=[(length, queries)],
        padding_rows=padding,
    )
    expected = naive.paged_attention(*case.args, scale=0.1)
    query, key_cache, value_cache, table, *_ = case.args
    queried = far(many + 60, heads, size, stride=heads * size)
    queried[many:] = query
    args = (
        queried,
        key_cache,
        value_cache,
        table.expand(2, -1),
        torch.tensor([many, length], dtype=torch.int32),
        torch.tensor([0, many, many + queries], dtype=torch.int32),
    )
    # Those that share the keys of few queries, and the tiles of the last 64 rows, which come first.
    with far_outputs(), only_some_programs(4 + 9, last=False):
        found = ours.paged_attention(*args, scale=0.1)
    torch.testing.assert_close(found[many:], expected, **CLOSE)


@pytest.mark.parametrize("rotates", [True, False])
def test_rows_and_caches_of_a_cache_write(rotates):
    parts = [torch.randn(3, heads, 16) for heads in (2, 1, 1)]
    caches = [torch.zeros(3, 1, 16, 16) for _ in range(2)]
    positions, cos_sin = torch.tensor([4, 0, 2]), torch.randn(5, 8)
    slots = torch.tensor([40, 3, 47])
    apart, written = [spread(part) for part in parts], [spread(cache) for cache in caches]
    for kernels, rows, into in ((naive, parts, caches), (ours, apart, written)):
        if rotates:
            kernels.rotary_write_kv(*rows, positions, cos_sin, *into, slots, interleaved=False)
        else:
            kernels.write_kv(*rows[1:], *into, slots)
    for found, expected in zip((*apart, *written), (*parts, *caches), strict=True):
        torch.testing.assert_close(found.clone(), expected, **CLOSE)


def test_rows_of_norms_activations_and_the_embedding():
    x, residual, weight = torch.randn(3, 40), torch.randn(3, 40), torch.randn(40)
    apart = spread(x), spread(residual)
    for function, *others in (
        ("rms_norm", weight, 1e-5),
        ("layer_norm", weight, weight, 1e-5),
    ):
        found = getattr(ours, function)(apart[0], *others, apart[1])
        expected = getattr(naive, function)(x, *others, residual)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
    found, expected = (k.gated_activation(r, "silu") for k, r in ((ours, apart[0]), (naive, x)))
    torch.testing.assert_close(found, expected, **CLOSE)
    ids = torch.tensor([2, 0])
    assert ours.embedding(ids, apart[0]).equal(x[ids])


def of_one(slot: int, saves: list[int], first: int = 0) -> tuple[StepStates, Tensor, Tensor]:
    """A sequence whose last tokens are the step's, from row `first` on."""
    tokens = len(saves)
    step = [slot], [*[-1] * first, *saves], [first, first + tokens], [tokens + 6]
    slots, saved, starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in step)
    return StepStates(slots, saved), starts, lengths


@pytest.mark.parametrize("few", [2, 16], ids=["chunk", "one by one"])
def test_rows_and_states_of_recurrent_layers(few, monkeypatch):
    monkeypatch.setattr(triton_recurrent, "_FEW_TOKENS", few)
    channels, size, heads = 8192, 64, 2
    x, weight = torch.randn(3, channels), torch.randn(channels, 4)
    qkv, gates = torch.randn(3, 4 * size), torch.randn(3, 2 * heads)
    rates = -torch.rand(heads), torch.randn(heads)
    expected = [torch.randn(2, 3, channels), *torch.randn(2, 2, heads, size, size)]
    count = 2**31 // (heads * size * size) + 2
    found = [far(count, *old.shape[1:], stride=old[0].numel()) for old in expected]
    for one, other in zip(found, expected, strict=True):
        one[-2:] = other
    for kernels, states, slot, move in (
        (recurrent, expected, 0, Tensor.clone),
        (ours, found, count - 2, spread),
    ):
        where = of_one(slot, [-1, -1, slot + 1])
        states.append(kernels.causal_conv(move(x), weight, None, states[0], *where))
        parts = move(qkv), move(gates), *rates, states[1], *where
        states.append(kernels.gated_delta_rule(*parts, num_key_heads=1))
        parts = move(qkv), move(gates[:, :heads]), *rates, rates[0], states[2], *where
        states.append(kernels.state_space_scan(*parts, num_groups=1))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[-len(other) :], other, atol=1e-4, rtol=1e-4)


def test_outputs_of_recurrent_layers(monkeypatch):
    monkeypatch.setattr(triton_recurrent, "_FEW_TOKENS", 2**31)  # a million chunks are too many
    many, heads, size, value_size = 2**20, 16, 16, 128
    x, weight = torch.randn(2, heads * value_size), torch.randn(heads * value_size, 2)
    qkv, gates = torch.randn(2, 32 + heads * value_size), torch.randn(2, 2 * heads)
    rates = -torch.rand(heads), torch.randn(heads)
    conv_states, states = torch.randn(1, 1, x.shape[1]), torch.randn(1, heads, size, value_size)

    def run(kernels, first: int, move: Callable[[Tensor], Tensor]) -> list[Tensor]:
        where = of_one(0, [-1, -1], first)
        conv = kernels.causal_conv(move(x), weight, None, conv_states.clone(), *where)
        parts = move(qkv), move(gates), *rates, states.clone(), *where
        passed = move(qkv), move(gates[:, :heads]), *rates, rates[0], states.clone(), *where
        scanned = kernels.state_space_scan(*passed, num_groups=1)
        return [conv, kernels.gated_delta_rule(*parts, num_key_heads=1), scanned]

    def at_the_end(tensor: Tensor) -> Tensor:
        moved = far(many + 2, tensor.shape[1], stride=heads * value_size + 32)
        moved[many:] = tensor
        return moved

    # Of the convolution, the first tile of the sequence.
    with far_outputs(), only_some_programs(heads * value_size // 32, last=False):
        found = run(ours, many, at_the_end)
    for one, other in zip(found, run(recurrent, 0, Tensor.clone), strict=True):
        torch.testing.assert_close(one[many:], other, atol=1e-4, rtol=1e-4)
    row = torch.randn(1, K)
    x = far(N, K, stride=K)
    x[-1] = row
    with far_outputs(), only_some_programs(1):
        gated, normed = ours.sigmoid_gate(x, x), ours.gated_rms_norm(x, x, row[0], 1e-6)
    torch.testing.assert_close(gated[-1:], recurrent.sigmoid_gate(row, row), **CLOSE)
    expected = recurrent.gated_rms_norm(row, row, row[0], 1e-6)
    torch.testing.assert_close(normed[-1:], expected, **CLOSE)


def last_row(rows: Callable[[Tensor], Tensor]) -> Tensor:
    """Of more than 2^31 elements: that of the last row of K inputs."""
    ids = torch.zeros(N, dtype=torch.int64)
    ids[-1] = 1
    with far_outputs(), only_some_programs(1):
        return rows(ids)[-1]


def test_rows_from_an_embedding():
    weight = torch.randn(2, K)
    assert last_row(lambda ids: ours.embedding(ids, weight)).equal(weight[1])
    planes = PlanesLinear(grouped(3, 0, "all")(2, K), None, torch.float32)
    assert last_row(planes.rows).equal(planes.unpack()[1])
    words = prepare_quantised(weight, None, "int4")
    assert last_row(words.rows).equal(words.unpack()[1])


def test_rows_of_blocks():
    caches = [torch.randn(4, 2, 4)]
    blocks = TritonBlockRows(caches)
    blocks.width = STRIDE  # as if there were as many caches
    rows = far(3, 4, dtype=torch.int64)
    ids = torch.tensor([3, 0, 1])
    blocks.pack(ids, rows)
    assert rows.clone().view(torch.float32).view(3, 2, 4).equal(caches[0][ids])


def test_rows_of_logits_and_of_counts():
    logits = torch.randn(3, 300)
    wishes = SamplingTensors(
        torch.full((3,), 0.8),
        torch.tensor([0, 0, 7], dtype=torch.int32),
        torch.tensor([1.0, 0.9, 1.0], dtype=torch.float64),
        torch.zeros(3),
        torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64),
    )
    apart, ids = spread(logits), torch.tensor([4, 299, 0])
    for wanted in (wishes, SamplingTensors(*(wish.flip(0) for wish in wishes))):
        assert sampling.sample(apart, wanted).equal(naive_sampling.sample(logits, wanted))
    assert sampling.greedy(apart).equal(naive_sampling.greedy(logits))
    found, expected = sampling.logprobs(apart, ids, 2), naive_sampling.logprobs(logits, ids, 2)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    counts = far(3, STRIDE, dtype=torch.int32)
    sampling.add_tokens(counts, torch.tensor([2, 0], dtype=torch.int32), torch.tensor([5, 6]))
    assert (int(counts[2, 5]), int(counts[0, 6])) == (1, 1)


def test_rows_of_adapters_and_experts():
    x = torch.randn(3, 40)
    found, expected = (torch.zeros(3, 24) for _ in range(2))
    for kernels, rows, y in ((ours, spread(x), found), (naive, x, expected)):
        table = kernels.AdapterTable(1, 24, 40, torch.float32, torch.device("cpu"), 4)
        table.set(0, torch.ones(4, 40), torch.ones(24, 4))
        mine = AdapterRows.of(np.zeros(3, dtype=np.int32), torch.device("cpu"), 1)
        kernels.add_adapters(y, rows, table, mine)
    torch.testing.assert_close(found, expected, **CLOSE)
    router, gate_up, down = torch.randn(3, 2), torch.randn(2, 16, 40), torch.randn(2, 40, 8)
    found, expected = (
        kernels.moe(
            rows, logits, *(list(map(kernels.prepare_linear, w)) for w in (gate_up, down)),
            Routing(1, True), "silu",
        )
        for kernels, rows, logits in ((ours, spread(x), spread(router)), (naive, x, router))
    )  # fmt: skip
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def check_last_rows(run, config: Config, weight: Tensor, rows: int) -> None:
    """The last two outputs are products with this [2, K] weight."""
    x = torch.randn(rows, weight.shape[1])
    with only_some_programs(1 + (config.block_n < 2)):
        y = run(x, config)
    torch.testing.assert_close(y[:, -2:], x @ weight.T, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("config", [Config("gemv", 1, 1), Config("skinny", 16, 16, 128, 4, 2)])
def test_rows_of_a_weight(config):
    weight = far(N, K, stride=K)
    weight[-2:] = torch.randn(2, K)
    layer = prepare_linear(weight)
    check_last_rows(layer.run, config, weight[-2:], 1 if config.kernel == "gemv" else 3)


@pytest.mark.parametrize("config", [Config("gemv", 1, 1), Config("gemm", 16, 16, 128)])
def test_rows_of_words(config):
    words = far(N, K, stride=K, dtype=torch.int32)
    words[-2:] = torch.randint(-(2**31), 2**31, (2, K))
    packed = PackedWeight(words, torch.ones(N, 1), None, 4, WHOLE_ROW, 8 * K)
    layer = PackedQuantLinear(packed, None, torch.float32, "int4")
    weight = packed.unpack(torch.float32, slice(N - 2, N))
    assert weight.unique().numel() == 16
    assert layer.rows(torch.tensor([N - 1])).equal(weight[1:])
    check_last_rows(layer.run, config, weight, 1 if config.kernel == "gemv" else 3)


@pytest.mark.parametrize("config", [Config("gemm", 1, 2, 512), Config("gemm", 16, 16, 128)])
def test_rows_of_planes(config):
    layer = PlanesLinear(grouped(8, 0, "all")(2, K), None, torch.float32)
    weight = layer.unpack()
    planes = layer.packed
    assert planes.weight.scales is not None
    low, scales = far(N, K, stride=K, dtype=torch.uint8), torch.ones(N, 1)
    low[-2:], scales[-2:] = planes.weight.low, planes.weight.scales
    planes.weight = planes.weight._replace(low=low, scales=scales)
    planes.out_features = N
    assert layer.rows(torch.tensor([N - 1])).equal(weight[1:])
    check_last_rows(layer.run, config, weight, config.block_m)


def test_rows_that_are_quantised(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x = far(N, K, stride=K)
    x[-2:] = torch.randn(2, K)
    layer = Fp8Linear(torch.ones(1, K), None)
    with only_some_programs(2):
        codes, scales = layer.quantise(x)
    expected, expected_scales = quantise_fp8(x[-2:])
    assert codes[-2:].float().equal(expected.float())
    torch.testing.assert_close(scales[-2:], expected_scales, rtol=2e-7, atol=0.0)
