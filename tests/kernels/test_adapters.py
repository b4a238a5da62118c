"""Low-rank adapters of single rows: every backend against the formula, row by row."""

import importlib
from typing import NamedTuple

import numpy as np
import pytest
import torch

from streamserve_kernels import Kernels, load
from streamserve_kernels.adapters import AdapterRows
from tests.kernels.pretended_gpu import capture

NUM_SLOTS, MAX_RANK = 3, 17
CPU = torch.device("cpu")


def rows_of(slots: list[int], device: torch.device = CPU) -> AdapterRows:
    return AdapterRows.of(np.array(slots, dtype=np.int32), device, NUM_SLOTS)


def matrices(rank: int, shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
    return a, torch.randn(shape[0], rank, generator=generator)


class Backend(NamedTuple):
    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    tolerance: float

    def check(self, slots: list[int], shape: tuple[int, int]) -> None:
        """Each row gets what the formula says of its own adapter; those without one are left."""
        out_features, in_features = shape
        table = self.kernels.AdapterTable(NUM_SLOTS, *shape, self.dtype, self.device, MAX_RANK)
        sets = {slot: matrices(rank, shape, slot) for slot, rank in ((0, 17), (2, 4))}
        for slot, (a, b) in sets.items():  # none for 1
            table.set(slot, *matrices(MAX_RANK, shape, 9))  # what was there before leaves nothing
            table.set(slot, a, b)
        generator = torch.Generator().manual_seed(7)
        # Rows of a fused product: further apart than they are long.
        x = torch.randn(len(slots), in_features + 6, generator=generator).to(self.dtype)
        x, y = x[:, :in_features], torch.randn(len(slots), out_features, generator=generator)
        y = y.to(self.dtype)
        expected = y.double()
        for i, slot in enumerate(slots):
            if slot in sets:
                a, b = (part.to(self.dtype).double() for part in sets[slot])
                expected[i] += b @ (a @ x[i].double())
        rows, on_device = rows_of(slots, self.device), x.to(self.device)
        found = self.kernels.add_adapters(y.to(self.device, copy=True), on_device, table, rows)
        again = self.kernels.add_adapters(y.to(self.device, copy=True), on_device, table, rows)
        assert found.dtype == self.dtype
        assert torch.equal(found, again)
        bounds = {"rtol": self.tolerance, "atol": self.tolerance}
        torch.testing.assert_close(found.cpu().double(), expected, **bounds)
        untouched = [i for i, slot in enumerate(slots) if slot not in sets]
        assert torch.equal(found.cpu()[untouched], y[untouched])
        for slot in sets:
            table.clear(slot)
        left = self.kernels.add_adapters(y.to(self.device, copy=True), on_device, table, rows)
        assert torch.equal(left.cpu(), y)


SHAPES = [(16, 32), (70, 45), (577, 300)]
SLOTS = [[1], [-1, 0, 2, 2, -1, 1, 0], [0] * 9 + [2] * 4 + [-1, 1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("backend", ["naive", "native"])
def test_each_row_gets_its_own_adapter(request, backend, slots, shape):
    kernels: Kernels = request.getfixturevalue(backend)
    if backend == "native":
        Backend(kernels, CPU, torch.bfloat16, 0.06).check(slots, shape)
    else:
        Backend(kernels, CPU, torch.float32, 1e-5).check(slots, shape)


@pytest.fixture
def triton(device, dtype) -> Backend:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    return Backend(load(device, "triton"), device, dtype, tolerance)


def test_on_a_gpu_each_row_gets_its_own_adapter(triton):
    """In tiles that are full and in some that are not; and in the tiles of many rows."""
    for slots in (SLOTS[1], [2, -1, 0, 0] * 10):
        triton.check(slots, SHAPES[1])
    if triton.device != CPU:
        for slots in (*SLOTS, [2, -1, 0, 0, 1] * 200):
            triton.check(slots, SHAPES[2])


def test_an_adapter_that_is_no_number_stays_alone(triton):
    """Tiles end between two slots' matrices."""
    table = triton.kernels.AdapterTable(3, 70, 45, triton.dtype, triton.device, MAX_RANK)
    for slot, factor in enumerate((torch.nan, 1.0, torch.nan)):
        table.set(slot, *(factor * part for part in matrices(MAX_RANK, (70, 45), slot)))
    x = torch.randn(2, 45).to(triton.device, triton.dtype)
    y = torch.zeros(2, 70, device=triton.device, dtype=triton.dtype)
    found = triton.kernels.add_adapters(y, x, table, rows_of([1, 0], triton.device))
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_ranks_and_inputs_in_several_pieces(triton, monkeypatch):
    """Where there are processors enough the inputs are cut, and many ranks are two blocks."""
    module = importlib.import_module("streamserve_kernels.triton.adapters")
    monkeypatch.setattr(module, "num_processors", lambda device: 64)
    shape, rank = (40, 700), 70
    table = triton.kernels.AdapterTable(1, *shape, triton.dtype, triton.device, rank)
    a, b = matrices(rank, shape, 3)
    table.set(0, a, b)
    x = torch.randn(2, shape[1]).to(triton.device, triton.dtype)
    y = torch.zeros(2, shape[0], dtype=triton.dtype, device=triton.device)
    rows = AdapterRows.of(np.zeros(2, dtype=np.int32), triton.device)
    found = triton.kernels.add_adapters(y, x, table, rows).cpu().float()
    bounds = {"rtol": triton.tolerance, "atol": 10 * triton.tolerance}
    torch.testing.assert_close(found, x.cpu().float() @ a.T @ b.T, **bounds)


def test_a_captured_graph_finds_the_rows_and_the_adapters_of_later(triton):
    device, dtype, kernels = triton.device, triton.dtype, triton.kernels
    shape = (70, 45) if device == CPU else (577, 320)
    table = kernels.AdapterTable(NUM_SLOTS, *shape, dtype, device, MAX_RANK)
    rows = rows_of([-1] * 20, device)
    x, y = (torch.randn(20, size, device=device).to(dtype) for size in reversed(shape))
    kept = y.clone()
    kernels.add_adapters(y, x, table, rows)
    replay, _ = capture(lambda: kernels.add_adapters(y, x, table, rows))
    naive = load(device, "naive")
    for seed in range(2):
        twin = naive.AdapterTable(NUM_SLOTS, *shape, dtype, device, MAX_RANK)
        for slot, rank in ((seed, 17), (2, 3)):
            for one in (table, twin):
                one.set(slot, *matrices(rank, shape, seed))
        table.clear(1 - seed)
        later = rows_of([seed, 2, -1, 0, 1] * 4, device)
        for part, new in zip(rows, later, strict=True):
            part.copy_(new)
        y.copy_(kept)
        replay()
        expected = naive.add_adapters(kept.clone(), x, twin, later)
        torch.testing.assert_close(y, expected, rtol=triton.tolerance, atol=triton.tolerance)


def test_a_rows_result_does_not_depend_on_the_rows_beside_it(native):
    shape = (577, 300)
    table = native.AdapterTable(NUM_SLOTS, *shape, torch.bfloat16, CPU, MAX_RANK)
    for slot in range(NUM_SLOTS):
        table.set(slot, *matrices(8, shape, slot))
    slots = [0, 0, 1, -1, 2, 2, 2, 2, 2, 0, 1]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(slots), shape[1], generator=generator).bfloat16()
    y = torch.randn(len(slots), shape[0], generator=generator).bfloat16()
    together = native.add_adapters(y.clone(), x, table, rows_of(slots))
    for i, slot in enumerate(slots):
        alone = y[i : i + 1].clone()
        native.add_adapters(alone, x[i : i + 1], table, rows_of([slot]))
        assert torch.equal(together[i : i + 1], alone)


def test_matrices_that_do_not_fit_are_refused(naive, native):
    for kernels in (naive, native):
        table = kernels.AdapterTable(NUM_SLOTS, 16, 32, torch.bfloat16, CPU, 4)
        with pytest.raises(ValueError, match="beside a weight of"):
            table.set(0, torch.zeros(4, 16), torch.zeros(16, 4))
        with pytest.raises(ValueError, match="beside a weight of"):
            table.set(0, torch.zeros(4, 32), torch.zeros(16, 3))
        with pytest.raises(ValueError, match="rank 5 where 4"):
            table.set(0, torch.zeros(5, 32), torch.zeros(16, 5))
