"""A GPU's memory: arithmetic with made-up readings, and the steps that are run to measure."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamserve.errors import KVCacheMemoryError
from streamserve.models import allocate_kv_cache, kv_bytes_per_block
from streamserve.models.batch import zeros_in_one_piece
from streamserve.runner.cuda.memory import (
    GpuReading,
    ProfileShape,
    StepBytes,
    plan_gpu_memory,
    profile_batches,
    profile_step_bytes,
    read_gpu,
)
from streamserve.runner.cuda.step_key import StepKey, StepLadder
from streamserve.runner.memory import GIB, MIB
from tests.runner.tiny_llama import CPU, tiny_llama

# An H100 with a model of 8 billion weights: 15 GiB of them, 128 KiB of KV per token.
READING = GpuReading(total=80 * GIB, free=64 * GIB, reserved=15 * GIB)
PLAN = {
    "name": "cuda:0",
    "utilization": 0.9,
    "step_bytes": 2 * GIB,
    "kv_bytes_per_block": 4 * MIB,
    "block_size": 32,
    "max_model_len": 8192,
    "max_num_seqs": 256,
}


def plan(reading=READING, **changes):
    return plan_gpu_memory(reading, **{**PLAN, **changes})


def test_the_cache_gets_what_is_left_of_the_share():
    found = plan()
    # 72 GiB may be in use, and 1 GiB is by others, 15 and 2 by us.
    assert found.kv_bytes == 54 * GIB
    assert found.num_blocks == 54 * 256
    assert found.describe().splitlines()[:3] == [
        "available     71.0 GiB (90% of cuda:0 less what others use)",
        "weights       15.0 GiB",
        "step buffers  2.0 GiB",
    ]


def test_others_take_from_the_cache():
    busy = GpuReading(total=80 * GIB, free=44 * GIB, reserved=15 * GIB)
    assert plan(busy).kv_bytes == plan().kv_bytes - 20 * GIB


def test_a_size_that_was_asked_for_is_taken_or_refused():
    assert plan(kv_cache_memory=GIB).kv_bytes == GIB
    with pytest.raises(KVCacheMemoryError, match=r"Lower --kv-cache-memory to 55296MiB or less"):
        plan(kv_cache_memory=60 * GIB)


def test_a_small_model_is_not_given_all_of_it():
    found = plan(kv_bytes_per_block=16 * 1024, max_model_len=1024)
    assert found.num_blocks == 8 * 256 * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"utilization": 0.25, "max_model_len": 131_072},
            r"lower --max-model-len to 16384 or raise --gpu-memory-utilization or free memory",
        ),
        ({"utilization": 0.1}, r"or more memory, is needed; --gpu-memory-utilization says how"),
        ({"utilization": 0.01}, r"weights 15\.0 GiB .* available: 0 bytes"),
    ],
)
def test_refusals_say_what_would_help(changes, message):
    with pytest.raises(KVCacheMemoryError, match=message):
        plan(**changes)


@given(
    total=st.integers(1, 200),
    others=st.integers(0, 200),
    weights=st.integers(0, 200),
    step=st.integers(0, 50 * GIB),
    utilization=st.floats(0.01, 1.0),
    requested=st.none() | st.integers(1, 200 * GIB),
)
def test_what_is_planned_is_there(total, others, weights, step, utilization, requested):
    free = total - others - weights
    if free < 0:
        return
    reading = GpuReading(total * GIB, free * GIB, weights * GIB)
    try:
        found = plan(reading, step_bytes=step, utilization=utilization, kv_cache_memory=requested)
    except KVCacheMemoryError:
        return
    assert step + found.kv_bytes <= reading.free
    assert (others + weights) * GIB + step + found.kv_bytes <= utilization * total * GIB


def test_graphs_keep_what_they_work_on_and_share_the_logits():
    graphs = [StepKey(n, n, 1, False) for n in (1, 8, 64)]
    none, few, many = (
        StepBytes(largest=GIB, graphed=64 * MIB if count else 0).reserve(
            max_num_sampled=64, logits_row_bytes=MIB, graphs=graphs[:count]
        )
        for count in (0, 1, 3)
    )
    # Logits, edited ones, and two rows of counts for each seat, beside what these were before.
    assert none >= GIB + 64 * 5 * MIB
    assert few > none + 64 * MIB
    assert few < many < few + 64 * MIB  # not their rows of logits, which lie in one place


@pytest.mark.parametrize(
    ("seats", "max_model_len", "num_tokens", "lengths"),
    [
        (4, 64, 48, [1, 1, 1, 45]),  # one chunk beside decodes
        (4, 64, 4, [1, 1, 1, 1]),
        (8, 64, 3, [1, 1, 1]),
        (4, 20, 48, [1, 7, 20, 20]),  # no sequence is longer than it may be
        (2, 8, 64, [8, 8]),
        (1, 64, 16, [16]),
    ],
)
def test_the_largest_step(seats, max_model_len, num_tokens, lengths):
    shape = ProfileShape(seats, max_model_len, 4)
    batches = list(profile_batches(shape, num_tokens, CPU))
    for batch in batches:
        assert batch.query_start_loc.diff().tolist() == lengths
        assert batch.logits_indices.tolist() == (batch.query_start_loc[1:] - 1).tolist()
        assert max(lengths) <= batch.max_query_len <= max(*lengths, num_tokens)
        assert batch.max_seq_len is None
        assert batch.seq_lens.max() <= max_model_len
        assert batch.positions[batch.logits_indices].tolist() == (batch.seq_lens - 1).tolist()
        assert len(batch.input_ids) == len(batch.positions) == num_tokens
        assert (batch.slot_mapping >= 0).tolist() == [i < sum(lengths) for i in range(num_tokens)]
        assert batch.block_table.shape == (len(lengths), max_model_len // 4 + 1)
    if len(batches) > 1:
        assert batches[0].prefix_groups is None
        shared = batches[1].prefix_groups
        starts = batches[1].seq_lens - batches[1].query_start_loc.diff()
        assert (shared.num_blocks[0] * 4 <= starts[shared.members.long()]).all()
    assert len(batches) == 1 + (lengths.count(1) > 1)


def test_a_model_runs_them(tmp_path):
    model = tiny_llama(tmp_path, backend="naive")
    caches = allocate_kv_cache(model.spec, 4, 4, torch.float32, CPU, model.kernels)
    for batch in profile_batches(ProfileShape(3, 64, 4), 20, CPU):
        assert model.forward(batch, caches).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_caches_in_one_piece_do_not_touch(dtype):
    shapes = [(3, 2, 4, 5), (3, 2, 4, 7), (1,), (0, 2), (300,)]
    dtypes = [dtype, dtype, torch.float32, dtype, dtype]
    tensors = zeros_in_one_piece(list(zip(shapes, dtypes, strict=True)), CPU)
    assert [tuple(tensor.shape) for tensor in tensors] == shapes
    assert [tensor.dtype for tensor in tensors] == dtypes
    assert all(tensor.is_contiguous() for tensor in tensors)
    ends = 0
    for tensor in tensors:
        start = tensor.storage_offset() * tensor.itemsize
        assert start >= ends
        assert start % 512 == 0
        ends = start + tensor.nbytes
        assert not tensor.view(torch.uint8).any()


def test_a_cache_of_eight_bits_takes_half(tmp_path):
    model = tiny_llama(tmp_path)
    half, eight = (
        kv_bytes_per_block(model.spec, 32, dtype) for dtype in (torch.half, torch.float8_e4m3fn)
    )
    assert half == 2 * eight


@pytest.mark.gpu
def test_a_profile_of_the_gpu(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    model = tiny_llama(tmp_path, backend="naive", device=device)
    ladder = StepLadder(256, 8)
    before = read_gpu(device)
    step = profile_step_bytes(
        model,
        ladder=ladder,
        graphs=list(ladder.decodes()),
        max_model_len=64,
        block_size=4,
        kv_dtype=torch.float32,
    )
    after = read_gpu(device)
    assert step.largest >= step.graphed > 0
    assert step.largest >= 256 * 2 * 96 * 4  # the gate and the up projection, at least
    assert after.reserved <= before.reserved + 64 * MIB  # nothing is kept but work spaces
    assert 0 < before.free + before.reserved <= before.total
