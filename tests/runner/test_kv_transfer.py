"""Blocks to host memory and back: every bit, wherever they go."""

import random

import pytest
import torch
from torch import Tensor

from streamserve.core.plan import BlockTransfer, SchedulerOutput
from streamserve.errors import KVCacheMemoryError
from streamserve.runner import kv_transfer
from streamserve.runner.kv_transfer import KVTransfer
from streamserve.runner.memory import MIB, AvailableMemory, plan_host_blocks

NUM_BLOCKS, NUM_HOST_BLOCKS = 12, 30
SHAPES = {
    "words": [((2, 4, 8), (2, 4, 6)), ((1, 4, 8), (1, 4, 8))],
    "bytes": [((1, 3, 1), (1, 1, 1))],
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


def caches_of(shapes, device, dtype=torch.float16):
    return [
        tuple(torch.randn(NUM_BLOCKS, *shape).to(dtype).to(device) for shape in pair)
        for pair in shapes
    ]


def block(caches, block_id: int) -> list[Tensor]:
    return [cache[block_id].clone() for pair in caches for cache in pair]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("num_staged", [1, 3, 100])
def test_what_is_loaded_is_what_was_stored(device, shapes, num_staged):
    """Random stores, loads and writes, step after step, against a dictionary."""
    rng = random.Random(num_staged)
    torch.manual_seed(0)
    caches = caches_of(shapes, device)
    row_bytes = sum(tensor.nbytes for tensor in block(caches, 0))
    transfer = KVTransfer(caches, NUM_HOST_BLOCKS, staging_bytes=num_staged * row_bytes)
    on_host: dict[int, list[Tensor]] = {}
    with torch.inference_mode():
        for step_id in range(60):
            blocks = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
            written = blocks.pop()
            hosts = rng.sample(range(NUM_HOST_BLOCKS), 5)
            stores = [BlockTransfer(blocks.pop(), host_id) for host_id in hosts]
            loadable = sorted(on_host.keys() - set(hosts))
            loads = [
                BlockTransfer(blocks.pop(), host_id)
                for host_id in rng.sample(loadable, min(5, len(loadable)))
            ]
            expected = {pair.block_id: on_host[pair.host_block_id] for pair in loads}
            on_host |= {pair.host_block_id: block(caches, pair.block_id) for pair in stores}
            plan = SchedulerOutput(step_id, stores=stores, loads=loads)
            with transfer.beside(plan):
                for pair in caches:
                    for cache in pair:
                        cache[written] = step_id
            for block_id, contents in expected.items():
                assert same(block(caches, block_id), contents)
            for pair in stores:
                assert same(block(caches, pair.block_id), on_host[pair.host_block_id])
            assert (caches[0][0][written] == step_id).all()
    transfer.close()


def test_copies_keep_their_place_among_what_is_queued(device):
    """Slow work, then a write; its block is stored, and at once overwritten; and loaded, and read.

    Nothing here waits for the device but the last lines.
    """
    rows = 4096 if device.type == "cuda" else 8
    caches = [(torch.zeros(4, rows, rows, device=device),) for _ in range(2)]
    transfer = KVTransfer(caches, 3)
    slow = torch.eye(rows, device=device)
    seen = []
    with torch.inference_mode():
        for step in range(6):
            for _ in range(10):
                slow = slow @ slow
            for (cache,) in caches:
                cache[0] = slow * (step + 1)
            with transfer.beside(SchedulerOutput(step, stores=[BlockTransfer(0, step % 3)])):
                pass
            for (cache,) in caches:
                cache[0] = -1.0
            with transfer.beside(SchedulerOutput(step, loads=[BlockTransfer(2, step % 3)])):
                pass
            seen.append([cache[2, -1, -1].clone() for (cache,) in caches])
    assert [[float(value) for value in values] for values in seen] == [
        [step + 1.0] * 2 for step in range(6)
    ]
    transfer.close()


def test_a_step_that_raises_leaves_its_transfers_done(device):
    caches = caches_of(SHAPES["words"], device)
    before = block(caches, 3)
    transfer = KVTransfer(caches, 2)
    plan = SchedulerOutput(0, stores=[BlockTransfer(3, 1)])
    with pytest.raises(ValueError, match="the forward"), transfer.beside(plan):
        raise ValueError("the forward")
    with transfer.beside(SchedulerOutput(1, loads=[BlockTransfer(5, 1)])):
        pass
    assert same(block(caches, 5), before)
    transfer.close()
    transfer.close()


@pytest.mark.parametrize(
    ("host_ids", "runs"),
    [
        ([4], [(0, 1, 4)]),
        ([4, 5, 6], [(0, 3, 4)]),
        ([0, 2, 3, 9], [(0, 1, 0), (1, 3, 2), (3, 4, 9)]),
    ],
)
def test_neighbours_are_copied_together(host_ids, runs):
    assert list(kv_transfer._runs(host_ids)) == runs


@pytest.mark.parametrize(("copy_s", "expected"), [(0.0005, 16), (1.0, 1), (0.02, 1), (0.001, 8)])
def test_a_step_copies_for_a_few_milliseconds(copy_s, expected):
    """Two blocks of a staging buffer for two, in ``copy_s`` on the clock."""
    caches = caches_of(SHAPES["words"], torch.device("cpu"))
    row_bytes = sum(tensor.nbytes for tensor in block(caches, 0))
    transfer = KVTransfer(caches, NUM_HOST_BLOCKS, staging_bytes=2 * row_bytes)
    ticks = iter([0, copy_s, 5, 5 + 3 * copy_s, 20, 20 + 2 * copy_s])
    assert transfer.blocks_per_step(lambda: next(ticks)) == expected


def test_no_memory_on_the_host_is_said_by_size(monkeypatch):
    def refuse(shape, dtype):
        raise MemoryError

    monkeypatch.setattr(kv_transfer.huge_pages, "zeros", refuse)
    with pytest.raises(KVCacheMemoryError, match=r"the host has no 704 bytes of memory"):
        KVTransfer(caches_of(SHAPES["words"], torch.device("cpu")), 2)


def test_swap_space_becomes_host_blocks():
    available = AvailableMemory(64 * MIB, "MemAvailable")
    assert plan_host_blocks(5 * MIB, 2 * MIB, available) == 2
    with pytest.raises(KVCacheMemoryError, match=r"space 65\.0 MiB is more than the host has"):
        plan_host_blocks(65 * MIB, MIB, available)
    with pytest.raises(KVCacheMemoryError, match=r"at least one KV block, 2\.0 MiB, got 1\.0 MiB"):
        plan_host_blocks(MIB, 2 * MIB, available)
