"""Blocks of all caches into rows and back: Triton's against the twin in plain torch."""

import pytest
import torch
from torch import Tensor

from streamserve_kernels.block_rows import BlockRows, block_rows

DTYPES = [torch.bfloat16, torch.float8_e4m3fn]
SHAPES = {
    "layers alike": [(7, 2, 16, 64)] * 6,
    "large and small": [(5, 8, 16, 128), (5, 1, 16, 64)],  # more words than one program copies
    "keys and values differ": [(9, 1, 4, 24), (9, 1, 4, 16)] * 2,
    "not of words": [(6, 1, 1, 3), (6, 1, 2, 5)],
}


def caches_of(shapes, dtype, device) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randint(0, 255, shape, dtype=torch.uint8).view(torch.float8_e4m3fn).to(device)
        if dtype == torch.float8_e4m3fn
        else torch.randn(shape).to(dtype).to(device)
        for shape in shapes
    ]


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_packed_and_unpacked_as_the_twin_does(device, shapes, dtype):
    from streamserve_kernels.triton.block_rows import TritonBlockRows

    caches = caches_of(shapes, dtype, device)
    found, expected = TritonBlockRows(caches), BlockRows(caches)
    ids = torch.tensor([3, 0, 4], device=device)
    results = []
    for blocks in (found, expected):
        rows = torch.full((3, blocks.width), -1, device=device).to(blocks.dtype)
        blocks.pack(ids, rows)
        results.append(rows)
    assert torch.equal(*results)
    copies = [cache.clone() for cache in caches]
    for cache in caches:
        cache.view(torch.uint8).fill_(255)
    found.unpack(results[0], ids)
    for cache, copy in zip(caches, copies, strict=True):
        for block in range(cache.shape[0]):
            if block in ids.tolist():
                assert bits(cache[block]) == bits(copy[block])
            else:
                assert set(bits(cache[block])) == {255}


def test_nothing_to_move_moves_nothing(device):
    from streamserve_kernels.triton.block_rows import TritonBlockRows

    blocks = TritonBlockRows(caches_of(SHAPES["layers alike"], torch.bfloat16, device))
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    blocks.pack(empty, torch.empty(0, blocks.width, dtype=torch.int64, device=device))


def test_a_gpu_gets_the_kernel(device):
    caches = caches_of(SHAPES["layers alike"], torch.bfloat16, device)
    assert (type(block_rows(caches)) is BlockRows) == (caches[0].device.type == "cpu")
