"""Stored weights whose inputs are split between programs, against what their definition says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from streamserve_kernels.triton.stored import PlanesLinear, prepare_stored
from streamserve_kernels.triton.tuning import Config, bucket
from tests.kernels.conftest import dtype_on
from tests.kernels.stored_cases import CASES, grouped, squeezed
from tests.kernels.test_triton_quantised import check

SPLIT = (
    "gptq2",
    "gptq3",
    "table3",
    "q4_1",
    "q5_0",
    "q4_k",
    "q6_k",
    "nf4",
    "squeezed4",
    "fp8-rows",
    "fp8-one",
    "fp8-blocks",
)
MORE = {"q3_k": grouped(3, 16, "all"), "table3": squeezed(3, sparse=False)}


def prepared(case: str, shape: tuple[int, int], device: torch.device) -> PlanesLinear:
    stored, bias = (CASES | MORE)[case](*shape), torch.randn(shape[0])
    packed = prepare_stored(stored.to(device), bias.to(device), dtype_on(device))
    assert isinstance(packed, PlanesLinear)
    return packed


@pytest.mark.parametrize("case", SPLIT)
def test_inputs_are_split_between_programs(device, case):
    """Steps that are not whole, more rows than a tile has, counters that are zero again."""
    dtype = dtype_on(device)
    packed = prepared(case, (130, 576), device)
    held = packed.unpack()
    words = packed.packed.split.candidates(32)[0].block_k
    for rows, splits in ((20, 3), (3, 1)):
        x = torch.randn(rows, 576, device=device).to(dtype)
        config = Config("split", 16, 128, words, 4, 2, splits=splits)
        y = packed.run(x, config)
        check(y, x, held, packed.bias, config)
        assert packed.run(x[2:3], config).equal(y[2:3])  # whoever is beside it
        assert not packed.counters.any()


def test_every_float8_number(device):
    """The smallest, the largest, both zeros, and a row that has one that is no number."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).expand(3, 256).clone()
    codes[:2, 127] = codes[:2, 255] = 1.0
    case = CASES["fp8-one"](3, 256)
    stored = type(case)(codes, torch.ones(1, 1), None)
    packed = prepare_stored(stored.to(device), None, dtype_on(device))
    identity = torch.eye(256, device=device, dtype=packed.dtype)
    y = packed.run(identity, Config("split", 128, 128, 16, 4, 2))
    assert y.float()[:, :2].equal(codes.float()[:2].T.to(device))
    assert y[:, 2].isnan().all()


def test_planes_that_do_not_fit(device):
    """Groups, or inputs, that are no whole words."""
    for case, shape in (("q3_k", (40, 320)), ("q4_k", (40, 100))):
        assert prepared(case, shape, device).packed.split is None
    split = prepared("table3", (40, 320), device).packed.split
    assert [len(split.candidates(rows)) for rows in (1, 16, 32, 64, 128)] == [1, 1, 1, 1, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["q4_k", "q6_k", "nf4", "fp8-blocks"])
def test_every_candidate_is_the_product(case):
    packed = prepared(case, (4096, 4096), torch.device("cuda"))
    held = packed.unpack()
    for rows in (1, 5, 24, 64, 100):
        x = torch.randn(rows, 4096, device="cuda").bfloat16()
        for config in packed.candidates(bucket(rows)):
            check(packed.run(x, config), x, held, packed.bias, config)
